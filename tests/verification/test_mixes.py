"""Files of two splits that look alike, mixed in every way: always found."""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from shardkit.checkpoint.checkpoint import FINGERPRINT_BYTES
from shardkit.checkpoint.header import read_header
from shardkit.errors import ShardkitError, VerifyError
from shardkit.runtime.rank_shard import open_rank_shard
from shardkit.runtime.weights import read_tensors
from shardkit.shards import hash_manifest
from shardkit.shards.manifest import MANIFEST_NAME, Manifest
from shardkit.verification import check_files
from shardkit.verification.scope import Scope
from tests.helpers.damage import quiet
from tests.helpers.split_helpers import merge_folder, reshard_folder, split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

Change = Callable[[bytearray, int, int], None]


def invert(data: bytearray, start: int, stop: int) -> None:
    data[start:stop] = bytes(byte ^ 0xFF for byte in data[start:stop])


def invert_between_samples(data: bytearray, start: int, stop: int) -> None:
    if stop - start > 2 * FINGERPRINT_BYTES:
        invert(data, start + FINGERPRINT_BYTES, stop - FINGERPRINT_BYTES)


def two_splits(base: Path, tp_size: int, change: Change) -> tuple[list[Path], list[Manifest]]:
    """Splits of two sources that have the same names, shapes and config, and other weights."""
    shapes = llama(heads=12, kv=12, head=8, ffn=96, vocab=96)
    one = write_source(base / "one", llama_config(12, 12, 96), specs_of(shapes, "F32"))
    two = Path(shutil.copytree(one, base / "two"))
    data = bytearray((two / "model.safetensors").read_bytes())
    for entry in read_header(two / "model.safetensors").entries:
        change(data, entry.start, entry.stop)
    (two / "model.safetensors").write_bytes(data)
    folders = [base / "shards-one", base / "shards-two"]
    manifests = [split_folder(s, f, tp_size) for s, f in zip((one, two), folders, strict=True)]
    return folders, manifests


def mixes(
    base: Path, folders: list[Path], manifests: list[Manifest]
) -> list[tuple[Path, Manifest, list[int]]]:
    """Every folder of rank files from both splits, with either's manifest.

    And the ranks whose file is the other's.
    """
    made = []
    tp_size = manifests[0].tp_size
    for owner, chosen in product((0, 1), product((0, 1), repeat=tp_size)):
        if len(set(chosen)) == 1:
            continue
        folder = base / f"mix-{owner}-{''.join(map(str, chosen))}"
        shutil.copytree(folders[owner], folder)
        for rank, other in zip(manifests[owner].ranks, chosen, strict=True):
            shutil.copy(folders[other] / rank.name, folder / rank.name)
        foreign = [rank for rank, other in enumerate(chosen) if other != owner]
        made.append((folder, manifests[owner], foreign))
    assert len(made) == 2 * (2**tp_size - 2)
    return made


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ShardkitError) as caught:
        action()
    return str(caught.value)


def check_no_merge_and_no_reshard(folder: Path) -> str:
    out = folder.with_name("out")
    told = refusal(lambda: merge_folder(folder, out))
    assert refusal(lambda: reshard_folder(folder, out, 1)) == told
    assert not list(folder.parent.glob("*out*"))
    return told


def loaded(folder: Path, manifest: Manifest, tp_rank: int) -> int:
    names = set(manifest.ranks[tp_rank].pieces)
    return len(list(read_tensors(folder, manifest, manifest.mesh.rank(tp_rank), names, True)))


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_a_mix_of_two_splits_is_found_by_whoever_reads_it(tp_size: int, tmp_path: Path) -> None:
    folders, manifests = two_splits(tmp_path, tp_size, invert)
    assert manifests[0].split_id != manifests[1].split_id
    for folder, manifest, foreign in mixes(tmp_path, folders, manifests):
        for scope in (Scope(), Scope(quick=True)):
            faults = check_files(folder, quiet, scope).faults
            assert len(faults) == len(foreign)
            assert all("of another split" in fault for fault in faults)
        assert "of another split" in check_no_merge_and_no_reshard(folder)
        for tp_rank in range(tp_size):
            if tp_rank in foreign:
                told = refusal(partial(open_rank_shard, folder, tp_rank, tp_size))
                assert f"{folder / manifest.ranks[tp_rank].name}: of another split" in told
            else:
                open_rank_shard(folder, tp_rank, tp_size)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_splits_that_differ_where_no_sample_looks_are_told_apart_by_their_digests(
    tp_size: int, tmp_path: Path
) -> None:
    folders, manifests = two_splits(tmp_path, tp_size, invert_between_samples)
    assert manifests[0].split_id == manifests[1].split_id
    assert hash_manifest(manifests[0]) != hash_manifest(manifests[1])
    for folder, manifest, foreign in mixes(tmp_path, folders, manifests):
        faults = check_files(folder, quiet).faults
        assert len(faults) == len(foreign)
        assert all(f"rank {r}: " in fault for r, fault in zip(foreign, faults, strict=True))
        assert "damaged between byte" in check_no_merge_and_no_reshard(folder)
        for tp_rank in range(tp_size):
            if tp_rank in foreign:
                with pytest.raises(VerifyError, match="damaged between byte"):
                    loaded(folder, manifest, tp_rank)
            else:
                assert loaded(folder, manifest, tp_rank) == len(manifest.placements)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_another_splits_manifest_is_found(tp_size: int, tmp_path: Path) -> None:
    folders, _ = two_splits(tmp_path, tp_size, invert)
    shutil.copy(folders[1] / MANIFEST_NAME, folders[0] / MANIFEST_NAME)
    assert len(check_files(folders[0], quiet, Scope(quick=True)).faults) == tp_size
    assert "of another split" in check_no_merge_and_no_reshard(folders[0])
