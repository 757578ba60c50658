"""A split that is stopped or refused: nothing is left, and nothing else is touched."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import (
    OutputError,
    SourceChanged,
)
from tests.helpers.damage import append, modify, shorten
from tests.helpers.split_helpers import (
    merge_folder,
    reshard_folder,
    split_folder,
)
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama_source,
)


@pytest.mark.parametrize("change", [append, modify, shorten])
def test_a_source_that_changes_during_the_copy_is_refused_and_nothing_is_left(
    change: Any, tmp_path: Path
) -> None:
    source = llama_source(tmp_path / "source")
    file = source / "model.safetensors"
    os.utime(file, (1, 1))  # long ago: a clock that ticks slowly must not hide the change
    with pytest.raises(SourceChanged, match=r"model.safetensors: (changed|became shorter)"):
        split_folder(source, tmp_path / "shards", 2, progress=lambda _: change(file))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_stops_a_split_nothing_is_left(error: type[BaseException], tmp_path: Path) -> None:
    source = llama_source(tmp_path / "source")

    def stop(_: int) -> None:
        raise error

    with pytest.raises(error):
        split_folder(source, tmp_path / "shards", 2, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_exists_is_never_touched(kind: str, tmp_path: Path) -> None:
    source, out = llama_source(tmp_path / "source"), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = out.lstat()
    split_folder(source, tmp_path / "shards", 2)
    for attempt in (
        lambda: split_folder(source, out, 2),
        lambda: merge_folder(tmp_path / "shards", out),
        lambda: reshard_folder(tmp_path / "shards", out, 4),
    ):
        with pytest.raises(OutputError, match="out: exists"):
            attempt()
    assert out.lstat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "shards", "source"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(options, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk cannot be tried: no mount command")
    if done.returncode:
        pytest.skip(f"a full disk cannot be tried: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.root
def test_a_split_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path, tiny_disk: Path
) -> None:
    source = llama_source(tmp_path / "source", vocab=4000)
    with pytest.raises(OutputError, match=r"needs 0.00 GB, and its filesystem has 0.00 GB free"):
        split_folder(source, tiny_disk / "out", 2)
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.root
def test_a_disk_that_is_filled_by_others_meanwhile_leaves_nothing(
    tmp_path: Path, tiny_disk: Path
) -> None:
    source = llama_source(tmp_path / "source")

    def fill(_: int) -> None:
        with suppress(OSError), (tiny_disk / "hog").open("ab", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass

    with pytest.raises(OutputError, match="No space left on device"):
        split_folder(source, tiny_disk / "out", 2, progress=fill)
    assert [path.name for path in tiny_disk.iterdir()] == ["hog"]
    (tiny_disk / "hog").unlink()
    split_folder(source, tiny_disk / "out", 2)


@pytest.mark.root
def test_companions_that_do_not_fit_leave_nothing(tmp_path: Path, tiny_disk: Path) -> None:
    source = llama_source(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(bytes(300_000))
    with pytest.raises(OutputError, match=r"No space left|needs"):
        split_folder(source, tiny_disk / "out", 2)
    assert list(tiny_disk.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.helpers.split_helpers import split_folder

left = int(sys.argv[3])

def progress(_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

split_folder(Path(sys.argv[1]), Path(sys.argv[2]), 2, progress=progress)
"""


@pytest.mark.parametrize("calls", [1, 9, 21])
def test_a_killed_split_leaves_no_output_and_the_next_run_cleans_up(
    calls: int, tmp_path: Path
) -> None:
    source, out = llama_source(tmp_path / "source"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(calls)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path()}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 2, "the stage of the killed run is there"
    split_folder(source, out, 2)
    split_folder(source, tmp_path / "again", 2)
    assert contents(out) == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "source"]


def python_path() -> str:
    return str(Path(__file__).resolve().parents[2])
