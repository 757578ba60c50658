"""The order in which an output is written, synced and renamed, as strace sees it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command_line import environment
from tests.reliability.faults.durability import CALLS, faults
from tests.reliability.faults.scenarios import SCENES, Scene


def traced(tmp_path: Path, *command: str | Path) -> str:
    """Run Python under strace; the calls that write, sync and rename."""
    if shutil.which("strace") is None:
        pytest.skip("system calls are watched with strace, which is not installed")
    log = tmp_path / "strace.log"
    done = subprocess.run(
        ["strace", "-f", "-y", "-o", log, "-e", f"trace={CALLS}", sys.executable, *command],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    trace = log.read_text()
    if "exited with" not in trace:
        pytest.skip(f"strace cannot trace here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-1000:]
    return trace


NOTED = "from shardkit.output import writer as file_sink; file_sink.JOURNAL_INTERVAL = 700; "


COMMAND = f"import sys; {NOTED}from shardkit.cli import main; main()"


@pytest.mark.parametrize("scene", [*SCENES[:1], *SCENES[2:8]], ids=lambda scene: scene.name)
def test_everything_is_synced_before_it_counts(scene: Scene, tmp_path: Path) -> None:
    ground = tmp_path / "ground"
    ground.mkdir()
    scene.prepare(ground)
    trace = traced(tmp_path, "-c", COMMAND, *scene.command(ground))
    assert "journal.jsonl" in trace
    assert faults(trace, str(ground / scene.out)) == []


def lines_with(trace: str, *parts: str) -> list[str]:
    return [line for line in trace.splitlines() if all(part in line for part in parts)]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sound trace of a split to /ground/out, no calls overlapping, to be spoilt."""
    stage = "/ground/.out.shardkit-stage-01234567"
    calls = [
        f'openat(AT_FDCWD</>, "{stage}/rank", O_WRONLY|O_CREAT|O_EXCL, 0666) = 5<{stage}/rank>',
        f'pwrite64(5<{stage}/rank>, "..."..., 100, 0) = 100',
        f"fsync(5<{stage}/rank>) = 0",
        f'openat(AT_FDCWD</>, "{stage}/manifest", O_WRONLY|O_CREAT, 0666) = 5<{stage}/manifest>',
        f'write(5<{stage}/manifest>, "..."..., 9) = 9',
        f"fsync(5<{stage}/manifest>) = 0",
        f"fsync(5<{stage}>) = 0",
        f'renameat2(AT_FDCWD</>, "{stage}", AT_FDCWD</>, "/ground/out", RENAME_NOREPLACE) = 0',
        "fsync(5</ground>) = 0",
    ]
    return "\n".join(f"77 {call}" for call in calls)


def without(trace: str, *parts: str) -> str:
    (gone,) = lines_with(trace, *parts)
    return "\n".join(line for line in trace.splitlines() if line != gone)


def moved(trace: str, before: str, *parts: str) -> str:
    """One line of the trace moved to just before another."""
    (line,) = lines_with(trace, *parts)
    rest = without(trace, *parts).splitlines()
    (at,) = (i for i, other in enumerate(rest) if before in other)
    return "\n".join([*rest[:at], line, *rest[at:]])


SPOILT: dict[str, Callable[[str], str]] = {
    "rank: not synced": lambda t: without(t, "fsync", "/rank>"),
    "manifest: not synced": lambda t: t.replace("/manifest>) = 0", "/manifest>) = -1 EIO (...)"),
    "rank: not synced between": lambda t: moved(t, "pwrite64", "fsync", "/rank>"),
    "the folder is not synced after the last name": lambda t: without(t, "fsync", "4567>)"),
    "name in it changed": lambda t: moved(t, '-01234567/manifest", O', "fsync", "4567>)"),
    "ground: the folder is not synced after": lambda t: without(t, "fsync", "</ground>"),
    "nothing was published": lambda t: without(t, "renameat2"),
    "manifest: written after the rename": lambda t: moved(t, "fsync(5</ground>", "write(5<", "t>"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_the_lint_finds_what_is_out_of_order(fault: str, trace: str) -> None:
    assert faults(trace, "/ground/out") == []
    assert any(fault in found for found in faults(SPOILT[fault](trace), "/ground/out"))


LIBRARY = """
import sys
import numpy
from safetensors.numpy import save_file
save_file({"a": numpy.zeros(9)}, sys.argv[1])
"""


CHECKPOINT = """
import sys, torch
import torch.distributed.checkpoint as dcp
dcp.save({"a": torch.zeros(9)}, checkpoint_id=sys.argv[1], no_dist=True)
"""


def test_the_lint_finds_the_safetensors_library_unsynced(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    out = tmp_path / "a.safetensors"
    found = faults(traced(tmp_path, "-c", LIBRARY, out), str(out))
    assert any("not synced between its last write and the rename" in fault for fault in found)


@pytest.mark.slow
def test_the_lint_finds_distributed_checkpoints_unsynced(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "saved"
    found = faults(traced(tmp_path, "-c", CHECKPOINT, out), str(out / ".metadata"))
    print(found)
    assert any("not synced between its last write and the rename" in fault for fault in found)
