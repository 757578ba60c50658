"""A shard that is shorter or longer than it was written is refused, whatever its length.

`pytest -m slow tests/verification/test_lengths.py` tries every length of a 40 KB file.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from shardkit.errors import ManifestError
from shardkit.runtime.rank_shard import open_rank_shard
from shardkit.runtime.weights import read_tensors
from shardkit.shards.manifest_json import read_manifest
from shardkit.shards.reader import open_shard
from shardkit.verification import check_files
from shardkit.verification.scope import Scope
from tests.helpers.damage import Split, quiet
from tests.helpers.split_helpers import merge_folder, split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

WORDS = r"truncated|extended"
LARGE = [1 << power for power in (20, 22, 24, 26, 28, 30, 32, 34, 38, 40)]  # as holes


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """A folder for one rank, its file 40 kB long."""
    shapes = llama(ffn=88, vocab=128)
    source = write_source(tmp_path / "source", llama_config(ffn=88), specs_of(shapes))
    found = Split(tmp_path / "shards", split_folder(source, tmp_path / "shards", 1))
    assert 35_000 < len(found.sound[0]) < 45_000
    return found


def check_length(split: Split, length: int, thorough: bool = False) -> None:
    """Make the file that long, and see it refused."""
    path = split.path(0)
    os.truncate(path, length)
    with pytest.raises(ManifestError) as caught:
        os.close(open_shard(split.folder, split.manifest, split.manifest.mesh.rank(0)))
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert ("extended" if length > len(split.sound[0]) else "truncated") in text
    if not thorough:
        return
    for scope in (Scope(), Scope(quick=True), Scope(rank=0)):
        found = check_files(split.folder, quiet, scope)
        assert (found.verdict, found.faults) == ("failed", (text,))
    for verify in (False, True):
        with pytest.raises(ManifestError, match=WORDS):
            next(
                read_tensors(
                    split.folder,
                    split.manifest,
                    split.manifest.mesh.rank(0),
                    ["model.norm.weight"],
                    verify,
                )
            )
    with pytest.raises(ManifestError, match=WORDS):
        open_rank_shard(split.folder, 0, 1)
    with pytest.raises(ManifestError, match=WORDS):
        merge_folder(split.folder, split.folder.parent / "merged")
    assert not (split.folder.parent / "merged").exists()


def check_shorter(split: Split, lengths: Iterable[int]) -> None:
    """Lengths from long to short, so that what is left is what was written."""
    for turn, length in enumerate(lengths):
        check_length(split, length, turn % 100 == 0)


def test_a_shorter_file_is_refused(split: Split) -> None:
    size = len(split.sound[0])
    check_shorter(split, [size - 1, size - 2, *range(size - 3, 0, -37), 9, 8, 7, 1, 0])


def test_a_longer_file_is_refused(split: Split) -> None:
    size = len(split.sound[0])
    for length in [size + 1, size + 2, *range(size + 3, size + 4096, 37)]:
        check_length(split, length)
    for length in LARGE:
        check_length(split, length, thorough=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_shorter_length_is_refused(split: Split) -> None:
    check_shorter(split, range(len(split.sound[0]) - 1, -1, -1))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_longer_length_up_to_twice_the_files_is_refused(split: Split) -> None:
    size = len(split.sound[0])
    for length in range(size + 1, 2 * size):
        check_length(split, length, length % 100 == 0)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_manifest_that_was_cut_short_is_refused(length: int, split: Split) -> None:
    os.truncate(split.folder / "manifest.json", length)
    with pytest.raises(ManifestError, match="damaged or truncated"):
        read_manifest(split.folder)
