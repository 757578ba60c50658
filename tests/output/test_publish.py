"""Publishing: a folder appears whole, once, and over nothing."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit.errors import OutputError
from shardkit.output.destination import Destination
from shardkit.output.publish import StagingFolder, publish_folder
from tests.helpers.synthetic_checkpoints import contents

ROOT = Path(__file__).resolve().parents[2]


def stage_of(out: Path) -> Path:
    """The stage that a run to `out` has, or one for it to find."""
    return next(iter(Destination(out).find_stages()), Destination(out).new_stage_path())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_only_when_everything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publish_folder(Destination(out)) as stage:
        stage.write("a", b"1")
        os.write(stage.create("b", 3), b"two")
        stage.sync_file("b")
        assert not out.exists()
    assert contents(out) == {"a": b"1", "b": b"two"}
    assert names(tmp_path) == ["out"]


def appear(out: Path, kind: str, stage: StagingFolder) -> None:
    """Write to the stage, and have another run make something at `out`."""
    stage.write("a", b"1")
    if kind == "file":
        out.write_text("theirs")
    elif kind == "link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "full folder":
            (out / "theirs").write_text("theirs")


@pytest.mark.parametrize("kind", ["file", "empty folder", "full folder", "link"])
def test_an_output_that_appears_meanwhile_is_not_replaced(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=r"out: File exists"),
        publish_folder(Destination(out)) as stage,
    ):
        appear(out, kind, stage)
    assert names(tmp_path) == ["out"]
    assert out.is_symlink() or not (out / "a").exists()


def test_a_stage_left_by_a_killed_run_is_emptied(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage_of(out).mkdir()
    (stage_of(out) / "a").write_text("half a file")
    with publish_folder(Destination(out)) as stage:
        stage.write("b", b"whole")
    assert contents(out) == {"b": b"whole"}


def test_a_stage_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "kept").write_text("kept")
    stage_of(out).symlink_to(theirs)
    with pytest.raises(OutputError), publish_folder(Destination(out)):
        pass
    assert contents(theirs) == {"kept": b"kept"}


HOLD = """
import sys, time
from pathlib import Path
from shardkit.output.publish import publish_folder
from shardkit.output.destination import Destination
with publish_folder(Destination(Path(sys.argv[1]))) as stage:
    stage.write("theirs", b"theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `out`, which it ends when its input does."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_stage_that_another_process_is_writing_is_left_alone(
    tmp_path: Path, other_run: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="out: another shardkit is writing it"),
        publish_folder(Destination(out)),
    ):
        pass
    assert names(stage_of(out)) == ["theirs"]
    other_run.communicate("")
    assert other_run.returncode == 0
    assert contents(out) == {"theirs": b"theirs"}


def test_a_lock_dies_with_its_process(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    with publish_folder(Destination(tmp_path / "out")) as stage:
        stage.write("ours", b"ours")
    assert contents(tmp_path / "out") == {"ours": b"ours"}


def test_the_lock_is_let_go_when_a_run_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        begin_and_fail(out)
    assert names(tmp_path) == []
    stage_of(out).mkdir()
    handle = os.open(stage_of(out), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def begin_and_fail(out: Path) -> None:
    with publish_folder(Destination(out)) as stage:
        stage.create("a", 5)
        raise ZeroDivisionError


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open descriptors are counted in /proc")
    (tmp_path / ".bad.shardkit-stage-01234567" / "sub").mkdir(parents=True)
    before = open_files()
    with pytest.raises(ZeroDivisionError):
        begin_and_fail(tmp_path / "out")
    with pytest.raises(OutputError), publish_folder(Destination(tmp_path / "bad")):
        pass
    assert open_files() == before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with publish_folder(Destination(tmp_path / "out")) as stage:
            stage.write("small", b"1")
            stage.create("large", 9)
            stage.sync_file("large")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "out" / n).stat().st_mode) for n in ("small", "large")]
    assert modes == [0o666 & ~umask] * 2
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_a_file_is_never_written_twice(tmp_path: Path) -> None:
    stage = StagingFolder(tmp_path)
    stage.write("a", b"1")
    with pytest.raises(OutputError, match="a: File exists"):
        stage.create("a", 1)


def test_room_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    stage = StagingFolder(tmp_path)
    with pytest.raises(OutputError, match=r"a: (No space left on device|File too large)"):
        stage.create("a", 1 << 60)
    stage.close()


def test_an_output_needs_a_folder_to_be_in(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder to write out in"):
        Destination(tmp_path / "none" / "out").check()
