"""Merge and reshard hash every byte of the shards in the pass that copies it."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shardkit.checkpoint.header import read_header
from shardkit.convert import merge, reshard
from shardkit.errors import ManifestError, VerifyError
from shardkit.output import stream
from shardkit.shards import checked_reads
from tests.helpers.read_counts import count_reads
from tests.helpers.split_helpers import reshard_folder, shard_name, split_folder
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    specs_of,
    write_source,
)

KEY = "model.layers.0.self_attn.k_proj.weight"
Command = Callable[[Path, Path], object]


def merge_two(shards: Path, out: Path) -> object:
    return merge(shards, out)


def reshard_to_four(shards: Path, out: Path) -> object:
    return reshard(shards, out, 4)


COMMANDS = pytest.mark.parametrize("command", [merge_two, reshard_to_four])


def split_llama(tmp_path: Path, kv_heads: int) -> Path:
    """A Llama over two ranks, each of which has the keys of one head, or of the same."""
    config, shapes = llama_config(heads=4, kv=kv_heads), llama(heads=4, kv=kv_heads)
    source = write_source(tmp_path / "source", config, specs_of(shapes))
    split_folder(source, tmp_path / "shards", 2)
    return tmp_path / "shards"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The bytes that are read of each file."""
    return count_reads(monkeypatch)


@COMMANDS
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_every_byte_is_read_once(
    command: Command, kv_heads: int, tmp_path: Path, reads: Counter[str]
) -> None:
    """Of two copies of a head one is read to be copied, the other for its digest alone."""
    shards = split_llama(tmp_path, kv_heads)
    reads.clear()
    command(shards, tmp_path / "out")
    for rank in range(2):
        path = shards / shard_name(rank, 2)
        data = sum(entry.spec.nbytes for entry in read_header(path).entries)
        assert reads[path.name] == data


def test_what_is_copied_in_another_order_is_read_at_most_twice(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's half becomes two ranks' quarters, of which blocks are copied in turns."""
    shards = split_llama(tmp_path, 4)
    split_folder(tmp_path / "source", tmp_path / "four", 4)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 64)
    reads.clear()
    reshard_folder(shards, tmp_path / "out", 4)
    assert contents(tmp_path / "out") == contents(tmp_path / "four")
    for rank in range(2):
        path = shards / shard_name(rank, 2)
        data = sum(entry.spec.nbytes for entry in read_header(path).entries)
        assert data < reads[path.name] < 2 * data


@COMMANDS
@pytest.mark.parametrize("rank", [0, 1])
def test_damage_is_found_in_copies_that_are_not_read_to_be_copied(
    command: Command, rank: int, tmp_path: Path
) -> None:
    shards = split_llama(tmp_path, 1)
    path = shards / shard_name(rank, 2)
    (entry,) = (entry for entry in read_header(path).entries if entry.spec.name == KEY)
    data = bytearray(path.read_bytes())
    data[entry.stop - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match=f"rank {rank}: {KEY}: damaged"):
        command(shards, tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@COMMANDS
def test_shards_that_are_written_to_while_they_are_copied_are_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = split_llama(tmp_path, 4)
    plain = checked_reads.CheckedShards.finish

    def touch_and_finish(self: checked_reads.CheckedShards) -> None:
        os.utime(shards / shard_name(1, 2))
        plain(self)

    monkeypatch.setattr(checked_reads.CheckedShards, "finish", touch_and_finish)
    with pytest.raises(ManifestError, match="was written to while it was read"):
        command(shards, tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
