"""A resumed merge: it hashes what it reads and not what it writes, so what is left is compared."""

import os
from pathlib import Path

import pytest

from shardkit.output import writer
from shardkit.output.destination import Destination
from tests.helpers.damage import flip
from tests.helpers.split_helpers import merge_folder, split_folder
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    specs_of,
    write_source,
)
from tests.output.test_resume import killed


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of which a merge was killed at its fifth note."""
    monkeypatch.setattr(writer, "JOURNAL_INTERVAL", 2000)
    specs = specs_of(llama(vocab=400, ffn=96))
    source = write_source(tmp_path / "source", llama_config(ffn=96), specs)
    split_folder(source, tmp_path / "shards", 2)
    killed(merge_folder, tmp_path / "shards", tmp_path / "out", notes=5)
    return source


@pytest.fixture
def offsets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where files are written to from now on."""
    offsets: list[int] = []
    plain = os.pwrite

    def note_and_write(fd: int, view: memoryview, offset: int) -> int:
        offsets.append(offset)
        return plain(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", note_and_write)
    return offsets


def resume(source: Path, out: Path) -> None:
    merge_folder(out.with_name("shards"), out, resume=True)
    assert contents(out)["model.safetensors"] == contents(source)["model.safetensors"]


@pytest.mark.parametrize("at", [30, 4000, 8000])
def test_what_is_not_what_the_shards_have_is_written(
    at: int, source: Path, tmp_path: Path, offsets: list[int]
) -> None:
    (stage,) = Destination(tmp_path / "out").find_stages()
    flip(stage / "model.safetensors", at)
    resume(source, tmp_path / "out")
    assert min(offsets) <= at


def test_what_the_shards_have_is_not_written_again(
    source: Path, tmp_path: Path, offsets: list[int]
) -> None:
    resume(source, tmp_path / "out")
    assert min(offsets) > 10000  # five notes, each after 2000 bytes or more
