"""Reading a rank's file into tensors: its own bytes, whatever becomes of the file meanwhile."""

import json
import os
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from shardkit.dtypes import DTYPES
from shardkit.errors import ManifestError, VerifyError
from shardkit.recipe.parse import load_recipe
from shardkit.runtime import weights
from shardkit.runtime.rank_shard import choose_dtype
from shardkit.runtime.weights import map_tensors, read_tensors
from shardkit.shards.integrity import READ_BYTES, RankReader
from shardkit.shards.manifest_json import read_manifest
from shardkit.tensor import TensorSpec
from tests.helpers.damage import Split, written
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import write_source

ORDER = sorted(name for name, dtype in DTYPES.items() if dtype.torch_name)


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of each dtype that torch has, a scalar, and an empty one."""
    base = tmp_path_factory.mktemp("dtypes")
    specs = [TensorSpec(f"t_{dtype}", dtype, (3, 8)) for dtype in ORDER]
    specs += [TensorSpec(f"table{n}", "I64", (2,)) for n in range(3)]
    specs += [TensorSpec("scalar", "F32", ()), TensorSpec("empty", "BF16", (0, 4))]
    write_source(base / "source", {"model_type": "plain"}, specs)
    listed = json.dumps([spec.name for spec in specs])
    (base / "plain.toml").write_text(f'model_types = ["plain"]\nreplicate = {listed}\n')
    split_folder(base / "source", base / "shards", 1, load_recipe(base / "plain.toml"))
    return base / "shards"


@pytest.fixture
def split(every_dtype: Path, tmp_path: Path) -> Split:
    """A copy that a test may damage."""
    folder = Path(shutil.copytree(every_dtype, tmp_path / "shards"))
    return Split(folder, read_manifest(folder))


def names(split: Split) -> list[str]:
    """Every tensor, in the order of the file."""
    pieces = split.manifest.ranks[0].pieces
    return sorted(pieces, key=lambda name: (pieces[name].offset, name != "empty"))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("verify", [False, True])
def test_every_tensor_is_what_the_safetensors_library_reads(split: Split, verify: bool) -> None:
    found = dict(
        read_tensors(
            split.folder, split.manifest, split.manifest.mesh.rank(0), names(split), verify
        )
    )
    assert found.keys() == set(names(split))
    with safe_open(split.path(0), "pt") as file:
        for name, tensor in found.items():
            theirs = file.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape)
            assert raw(tensor) == raw(theirs)


def test_a_mapped_tensor_is_the_file_and_what_is_written_to_it_stays_in_the_process(
    split: Split,
) -> None:
    rank, data = split.manifest.mesh.rank(0), split.path(0).read_bytes()
    read = dict(read_tensors(split.folder, split.manifest, rank, names(split), False))
    mapped = dict(map_tensors(split.folder, split.manifest, rank, names(split)))
    assert mapped.keys() == read.keys()
    assert split.path(0).name in Path("/proc/self/maps").read_text()
    for name, tensor in mapped.items():
        assert (tensor.dtype, tensor.shape) == (read[name].dtype, read[name].shape)
        assert raw(tensor) == raw(read[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not the whole file's
    mapped["t_F32"].zero_()
    assert split.path(0).read_bytes() == data
    del mapped, tensor
    assert split.path(0).name not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_large_tensor_is_read_once_by_each_thread(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte once; and a file that is cut short meanwhile is an error."""
    spec = TensorSpec("large", "U8", (3 * READ_BYTES + 5,))
    write_source(tmp_path / "source", {"model_type": "plain"}, [spec])
    (tmp_path / "plain.toml").write_text('model_types = ["plain"]\nreplicate = ["large"]\n')
    split_folder(tmp_path / "source", tmp_path / "shards", 1, load_recipe(tmp_path / "plain.toml"))
    manifest = read_manifest(tmp_path / "shards")
    rank = manifest.mesh.rank(0)
    monkeypatch.setattr(weights, "count_rank_cores", lambda: threads)
    reads = record_reads(monkeypatch)
    ((_, tensor),) = read_tensors(tmp_path / "shards", manifest, rank, ["large"], False)
    assert (len(reads), sum(reads)) == (threads, spec.nbytes)
    path = tmp_path / "shards" / manifest.ranks[0].name
    with safe_open(path, "pt") as file:
        assert raw(tensor) == raw(file.get_tensor("large"))
    with RankReader(tmp_path / "shards", manifest, rank, False, threads) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ManifestError, match="became shorter"):
            reader.read(spec, [memoryview(bytearray(spec.nbytes))])


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each vectored read that follows."""
    reads: list[int] = []

    def read(fd: int, views: list[memoryview], offset: int) -> int:
        reads.append(preadv(fd, views, offset))
        return reads[-1]

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", read)
    return reads


def test_small_tensors_are_read_together(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read for those that follow each other, each byte once, and none of what is not loaded."""
    rank, every = split.manifest.mesh.rank(0), names(split)
    reads = record_reads(monkeypatch)
    list(read_tensors(split.folder, split.manifest, rank, every, False))
    whole = len(split.sound[0]) - split.headers[0]
    assert reads == [whole]
    reads.clear()
    skipped = every[4]
    read = dict(read_tensors(split.folder, split.manifest, rank, set(every) - {skipped}, False))
    spec = next(spec for spec in split.manifest.stored_specs(rank) if spec.name == skipped)
    assert (len(reads), sum(reads)) == (2, whole - spec.nbytes)
    assert read.keys() == set(every) - {skipped}


def test_nothing_is_read_ahead_of_quantized_weights(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(split.manifest.plan.grouping), "weights", {"any": None})
    rank, every = split.manifest.mesh.rank(0), names(split)
    reads = record_reads(monkeypatch)
    list(read_tensors(split.folder, split.manifest, rank, every, False))
    assert len(reads) == len([s for s in split.manifest.stored_specs(rank) if s.nbytes])


def test_batches_end_where_they_are_large_enough() -> None:
    specs = [TensorSpec(str(n), "U8", (n,)) for n in (3, 4, 5, 0, 9, 1, 2)]
    batches = weights.batch_specs(specs, {"3", "4", "5", "0", "9", "2"}, 8)
    assert [[spec.name for spec in batch] for batch in batches] == [
        ["3", "4", "5"], ["0", "9"], ["2"],
    ]  # fmt: skip


@pytest.mark.parametrize("verify", [False, True])
def test_what_was_read_does_not_change_with_the_file(split: Split, verify: bool) -> None:
    found = dict(
        read_tensors(
            split.folder, split.manifest, split.manifest.mesh.rank(0), names(split), verify
        )
    )
    before = {name: raw(tensor) for name, tensor in found.items()}
    split.path(0).write_bytes(bytes(len(split.sound[0])))
    os.truncate(split.path(0), 0)
    assert {name: raw(tensor) for name, tensor in found.items()} == before


@pytest.mark.parametrize("verify", [False, True])
def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_crash(
    split: Split, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_TOGETHER", 1)
    reading = read_tensors(
        split.folder, split.manifest, split.manifest.mesh.rank(0), names(split), verify
    )
    first, _ = next(reading)
    os.truncate(split.path(0), split.headers[0])
    with pytest.raises(ManifestError, match="became shorter") as caught:
        list(reading)
    assert f"{split.path(0)}: rank 0: " in str(caught.value)
    assert first == names(split)[0]


def test_a_file_changed_while_it_is_read_is_found(split: Split) -> None:
    reading = read_tensors(
        split.folder, split.manifest, split.manifest.mesh.rank(0), names(split), True
    )
    next(reading)
    at, byte = split.flipped(0, 8 * len(split.sound[0]) - 1)
    with written(split.path(0), at, byte), pytest.raises(VerifyError) as caught:
        list(reading)
    assert split.named(0, at) in str(caught.value)


def test_a_file_exchanged_while_it_is_read_is_not_looked_at(split: Split) -> None:
    reading = read_tensors(
        split.folder, split.manifest, split.manifest.mesh.rank(0), names(split), True
    )
    next(reading)
    (split.folder / "other").write_bytes(bytes(len(split.sound[0])))
    (split.folder / "other").rename(split.path(0))
    assert len(list(reading)) == len(names(split)) - 1


def test_no_file_is_mapped_and_none_left_open(split: Split) -> None:
    def held() -> list[str]:
        links = Path("/proc/self/fd").iterdir()
        return [str(link) for link in links if os.path.realpath(link) == str(split.path(0))]

    reading = read_tensors(
        split.folder, split.manifest, split.manifest.mesh.rank(0), names(split), True
    )
    next(reading)
    assert len(held()) == 1
    assert split.path(0).name not in Path("/proc/self/maps").read_text()
    assert isinstance(reading, Generator)
    reading.close()
    assert held() == []


def test_what_is_not_loaded_is_hashed_all_the_same(split: Split) -> None:
    at, byte = split.flipped(0, 8 * split.headers[0])
    wanted = names(split)[-1:]
    for verify in (False, True):
        assert (
            len(
                list(
                    read_tensors(
                        split.folder, split.manifest, split.manifest.mesh.rank(0), wanted, verify
                    )
                )
            )
            == 1
        )
    with written(split.path(0), at, byte):
        assert (
            len(
                list(
                    read_tensors(
                        split.folder, split.manifest, split.manifest.mesh.rank(0), wanted, False
                    )
                )
            )
            == 1
        )
        with pytest.raises(VerifyError) as caught:
            list(
                read_tensors(
                    split.folder, split.manifest, split.manifest.mesh.rank(0), wanted, True
                )
            )
    assert split.named(0, at) in str(caught.value)


def test_a_wrong_sum_that_no_tensors_mark_shows_is_found(split: Split) -> None:
    (rank,) = split.manifest.ranks
    tail = "0" * 48
    digest = replace(rank.digest, sha256=rank.digest.sha256[:16] + tail)
    manifest = replace(split.manifest, ranks=(replace(rank, digest=digest),))
    with pytest.raises(VerifyError, match="is not the manifest's"):
        list(read_tensors(split.folder, manifest, manifest.mesh.rank(0), names(split), True))


def test_a_model_computes_in_the_dtype_of_its_weights_not_of_its_tables(split: Split) -> None:
    assert choose_dtype(PreTrainedConfig(), split.manifest) in (torch.float32, torch.bfloat16)
    one = [p for p in split.manifest.plan.placements if p.spec.dtype in ("I64", "F8_E4M3", "F16")]
    plan = replace(split.manifest.plan, placements=tuple(one))
    assert choose_dtype(PreTrainedConfig(), replace(split.manifest, plan=plan)) == torch.float16
