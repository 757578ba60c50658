"""Files and weights are verified in one pass over every byte, which says what two passes say."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shardkit.checkpoint import open_checkpoint
from shardkit.checkpoint.header import read_header
from shardkit.shards import MANIFEST_NAME, Digest, encode_manifest, read_manifest
from shardkit.verification import Check, check_files, check_weights, verify, weights
from tests.helpers.damage import quiet, written
from tests.helpers.read_counts import count_reads
from tests.helpers.split_helpers import shard_name, split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

RANKS = 2
DOWN = "model.layers.0.mlp.down_proj.weight"  # divided along its rows: each rank has a part of all


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, shapes = llama_config(heads=4, kv=1), llama(heads=4, kv=1)
    return write_source(tmp_path / "source", config, specs_of(shapes))


@pytest.fixture
def shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A split, of which less than a row is compared at once."""
    monkeypatch.setattr(weights, "COMPARED_BYTES", 24)
    split_folder(source, tmp_path / "shards", RANKS)
    return tmp_path / "shards"


def verify_weights(shards: Path, source: Path) -> Sequence[Check]:
    report = verify(shards, source, level="weights")
    assert report is not None
    return report.checks


def verify_apart(shards: Path, source: Path) -> Sequence[Check]:
    """The two levels, each in a pass of its own."""
    with open_checkpoint(str(source)) as checkpoint:
        return check_files(shards, quiet), check_weights(shards, checkpoint, quiet)


def test_every_byte_of_source_and_shards_is_read_once(
    source: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = count_reads(monkeypatch)
    assert all(check.verdict == "passed" for check in verify_weights(shards, source))
    paths = [shards / shard_name(rank, RANKS) for rank in range(RANKS)]
    for path in [source / "model.safetensors", *paths]:
        assert counts[path.name] == sum(entry.spec.nbytes for entry in read_header(path).entries)


def test_sound_shards_have_the_report_of_two_passes(source: Path, shards: Path) -> None:
    checks = verify_weights(shards, source)
    assert checks == verify_apart(shards, source)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("where", ["header", "first", "middle", "last"])
def test_damage_has_the_report_of_two_passes(
    rank: int, where: str, source: Path, shards: Path
) -> None:
    path = shards / shard_name(rank, RANKS)
    start, stop = read_header(path).entries[0].start, path.stat().st_size
    at = {"header": 20, "first": start, "middle": (start + stop) // 2, "last": stop - 1}[where]
    with written(path, at, bytes([path.read_bytes()[at] ^ 1])):
        checks = verify_weights(shards, source)
        assert checks[0].verdict == "failed"
        if where == "header":  # of which the level weights can say nothing
            assert checks[1].verdict == "not run"
        else:
            assert checks == verify_apart(shards, source)
            assert checks[1].verdict == "failed"


def test_bytes_of_another_source_are_found_though_their_digests_are_right(
    source: Path, shards: Path
) -> None:
    """In the first and the last byte of a tensor of which each rank has a part of every row."""
    path = source / "model.safetensors"
    (entry,) = (entry for entry in read_header(path).entries if entry.spec.name == DOWN)
    for rank, at in enumerate((entry.start, entry.start + entry.spec.nbytes - 1)):
        with written(path, at, bytes([path.read_bytes()[at] ^ 1])):
            files, comparison = verify_weights(shards, source)
        assert files.verdict == "passed"
        assert comparison.verdict == "failed"
        (fault,) = comparison.faults
        assert fault.startswith(f"rank {rank}: {DOWN}: differs from the source at byte ")


def test_the_digest_of_a_whole_file_counts_though_all_bytes_are_the_source_s(
    source: Path, shards: Path
) -> None:
    manifest = read_manifest(shards)
    first = manifest.ranks[0]
    wrong = replace(first, digest=Digest(first.digest.size, "0" * 64))
    altered = replace(manifest, ranks=(wrong, *manifest.ranks[1:]))
    (shards / MANIFEST_NAME).write_bytes(encode_manifest(altered))
    files, comparison = verify_weights(shards, source)
    assert files.verdict == "failed"
    assert "sha256" in files.faults[0]
    assert comparison.verdict == "passed"


def test_memory_is_compared_to_its_last_byte() -> None:
    for size in range(70):
        one, other = bytearray(size), bytearray(size)
        assert weights.are_equal(memoryview(one), memoryview(other))
        assert not weights.are_equal(memoryview(one), memoryview(bytearray(size + 1)))
        for at in range(size):
            other[at] = 1
            assert not weights.are_equal(memoryview(one), memoryview(other))
            other[at] = 0
