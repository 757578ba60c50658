"""Damaged shard folders: a merge refuses them by name, and writes nothing."""

import os
from pathlib import Path

import pytest

from shardkit.checkpoint.header import read_header
from shardkit.errors import (
    ManifestError,
    ShardkitError,
)
from shardkit.tensor import TensorSpec
from tests.helpers.damage import append, modify
from tests.helpers.split_helpers import (
    merge_folder,
    shard_name,
    split_folder,
)
from tests.helpers.synthetic_checkpoints import (
    llama,
    llama_config,
    llama_source,
    specs_of,
    write_source,
)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A split over two ranks."""
    split_folder(llama_source(tmp_path / "source"), tmp_path / "shards", 2)
    return tmp_path / "shards"


def refused(shards: Path, tmp_path: Path) -> str:
    """What merge says, and that it wrote nothing."""
    with pytest.raises(ShardkitError) as caught:
        merge_folder(shards, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))
    assert not list(tmp_path.glob(".*merged*"))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_truncated_shard_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    path = shards / shard_name(1, 2)
    os.truncate(path, path.stat().st_size - 1)
    assert f"{path}: truncated" in refused(shards, tmp_path)


def test_an_extended_shard_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    append(shards / shard_name(0, 2))
    assert f"{shards / shard_name(0, 2)}: extended" in refused(shards, tmp_path)


def test_one_flipped_bit_is_found_and_its_file_and_tensor_named(
    shards: Path, tmp_path: Path
) -> None:
    path = shards / shard_name(1, 2)
    sound = path.read_bytes()
    for entry in read_header(path).entries:
        for at in (entry.start, entry.stop - 1):
            damaged = bytearray(sound)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            text = refused(shards, tmp_path)
            assert f"{path}: rank 1: {entry.spec.name}: damaged" in text


def test_a_flipped_bit_in_a_header_is_found(shards: Path, tmp_path: Path) -> None:
    path = shards / shard_name(0, 2)
    sound = path.read_bytes()
    for at in (0, 7, 8, 60, 200, 400):
        damaged = bytearray(sound)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert str(path) in refused(shards, tmp_path)


def test_every_damaged_shard_is_named(shards: Path, tmp_path: Path) -> None:
    for rank in range(2):
        modify(shards / shard_name(rank, 2))
    text = refused(shards, tmp_path)
    assert shard_name(0, 2) in text
    assert shard_name(1, 2) in text


def test_swapped_shards_are_told_apart(shards: Path, tmp_path: Path) -> None:
    one, two, spare = (shards / name for name in (shard_name(0, 2), shard_name(1, 2), "spare"))
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert "is the file of rank '1', renamed" in refused(shards, tmp_path)


def test_a_shard_of_another_split_is_refused(shards: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", llama_config(), other_weights())
    split_folder(other, tmp_path / "foreign", 2)
    name = shard_name(0, 2)
    (shards / name).write_bytes((tmp_path / "foreign" / name).read_bytes())
    assert "of another split" in refused(shards, tmp_path)


def other_weights() -> list[TensorSpec]:
    """The same names and shapes in another order, so that other bytes begin each tensor."""
    return specs_of(llama())[::-1]


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path) -> None:
    (shards / shard_name(1, 2)).unlink()
    assert f"{shard_name(1, 2)}: missing" in refused(shards, tmp_path)


def test_a_shard_that_is_a_link_or_a_pipe_is_refused(shards: Path, tmp_path: Path) -> None:
    path = shards / shard_name(1, 2)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert str(path) in refused(shards, tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refused(shards, tmp_path)


def test_a_companion_that_was_changed_is_refused(shards: Path, tmp_path: Path) -> None:
    (shards / "config.json").write_text("{}")
    assert "config.json: not the file that was copied" in refused(shards, tmp_path)


def test_a_folder_without_a_manifest_is_an_unfinished_split(shards: Path, tmp_path: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="not a shard folder, or unfinished"):
        merge_folder(shards, tmp_path / "merged")
