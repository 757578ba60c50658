"""Publishing: a folder appears whole, once, and over nothing."""

import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blueprints import contents, llama, llama_config, specs_of, write_source
from splitting import split_folder

from shardkit.errors import OutputError
from shardkit.publish import Stage, publishing
from shardkit.target import Target

HERE = Path(__file__).resolve().parent


def stage_of(out: Path) -> Path:
    """The stage that a run to `out` has, or one for it to find."""
    return next(iter(Target(out).stages()), Target(out).new_stage())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_only_when_everything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publishing(Target(out)) as stage:
        stage.write("a", b"1")
        os.write(stage.create("b", 3), b"two")
        stage.finish("b")
        assert not out.exists()
    assert contents(out) == {"a": b"1", "b": b"two"}
    assert names(tmp_path) == ["out"]


def appear(out: Path, kind: str, stage: Stage) -> None:
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
    with pytest.raises(OutputError, match=r"out: File exists"), publishing(Target(out)) as stage:
        appear(out, kind, stage)
    assert names(tmp_path) == ["out"]
    assert out.is_symlink() or not (out / "a").exists()


def test_a_stage_left_by_a_killed_run_is_emptied(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage_of(out).mkdir()
    (stage_of(out) / "a").write_text("half a file")
    with publishing(Target(out)) as stage:
        stage.write("b", b"whole")
    assert contents(out) == {"b": b"whole"}


def test_a_stage_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "kept").write_text("kept")
    stage_of(out).symlink_to(theirs)
    with pytest.raises(OutputError), publishing(Target(out)):
        pass
    assert contents(theirs) == {"kept": b"kept"}


HOLD = """
import sys, time
from pathlib import Path
from shardkit.publish import publishing
from shardkit.target import Target
with publishing(Target(Path(sys.argv[1]))) as stage:
    stage.write("theirs", b"theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `out`, which it ends when its input does."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent
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
        publishing(Target(out)),
    ):
        pass
    assert names(stage_of(out)) == ["theirs"]
    other_run.communicate("")
    assert other_run.returncode == 0
    assert contents(out) == {"theirs": b"theirs"}


def test_a_lock_dies_with_its_process(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    with publishing(Target(tmp_path / "out")) as stage:
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
    with publishing(Target(out)) as stage:
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
    with pytest.raises(OutputError), publishing(Target(tmp_path / "bad")):
        pass
    assert open_files() == before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with publishing(Target(tmp_path / "out")) as stage:
            stage.write("small", b"1")
            stage.create("large", 9)
            stage.finish("large")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "out" / n).stat().st_mode) for n in ("small", "large")]
    assert modes == [0o666 & ~umask] * 2
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_a_file_is_never_written_twice(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.write("a", b"1")
    with pytest.raises(OutputError, match="a: File exists"):
        stage.create("a", 1)


def test_room_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with pytest.raises(OutputError, match=r"a: (No space left on device|File too large)"):
        stage.create("a", 1 << 60)
    stage.close()


def test_an_output_needs_a_folder_to_be_in(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder to write out in"):
        Target(tmp_path / "none" / "out").check()


def source_folder(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", llama_config(), specs_of(llama()))


def traced(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Run a split under strace; its exit status, and the calls it made."""
    if shutil.which("strace") is None:
        pytest.skip("system calls are watched with strace, which is not installed")
    code = "import sys; from pathlib import Path; from splitting import split_folder\n"
    code += "split_folder(Path(sys.argv[1]), Path(sys.argv[2]), 2)"
    log = tmp_path / "strace.log"
    command = ["strace", "-f", "-y", "-o", str(log), *options, sys.executable, "-c", code]
    done = subprocess.run(
        [*command, str(tmp_path / "source"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        capture_output=True,
        check=False,
    )
    text = log.read_text()
    log.unlink()
    if "exited with" not in text and "killed by" not in text:
        pytest.skip(f"strace cannot trace here: {done.stderr.decode()[-200:]}")
    return done.returncode, text


def test_every_file_and_folder_is_synced_before_it_counts(tmp_path: Path) -> None:
    source_folder(tmp_path)
    status, text = traced(tmp_path, "-e", "trace=fsync,renameat2")
    assert status == 0
    calls = [
        Path(found[1]).name if (found := re.search(r"fsync\(\d+<(.*?)>\)", line)) else "rename"
        for line in text.splitlines()
        if "fsync(" in line or "renameat2(" in line
    ]
    at = calls.index("rename")
    written = set(names(tmp_path / "out"))
    assert written <= set(calls[:at]), "every file before the rename"
    assert calls[at - 2] == "manifest.json", "the manifest last of the files"
    assert calls[at - 1].startswith(".out.shardkit-stage"), "then the stage itself"
    assert calls[at + 1 :] == [tmp_path.name], "and after the rename the folder it is in"


STEPS = [  # strace counts each thread's calls; the main thread's syncs are these four
    ("fallocate", 1), ("fallocate", 2),
    ("fsync", 1),  # config.json
    ("fsync", 2),  # manifest.json
    ("fsync", 3),  # the stage
    ("renameat2", 1),
]  # fmt: skip
WATCHED = "trace=fsync,renameat2,fallocate"


@pytest.mark.parametrize(("call", "when"), [*STEPS, ("fsync", 4)])
def test_a_run_killed_at_any_step_leaves_a_whole_output_or_none(
    call: str, when: int, tmp_path: Path
) -> None:
    source, out = source_folder(tmp_path), tmp_path / "out"
    status, _ = traced(tmp_path, "-e", WATCHED, "-e", f"inject={call}:signal=KILL:when={when}")
    assert status in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert out.exists() <= ((call, when) in [("renameat2", 1), ("fsync", 4)])
    if not out.exists():
        split_folder(source, out, 2)
    split_folder(source, tmp_path / "again", 2)
    assert contents(out) == contents(tmp_path / "again")
    assert names(tmp_path) == ["again", "out", "source"]


@pytest.mark.parametrize(("call", "when"), STEPS)
def test_a_disk_that_fails_at_any_step_leaves_nothing(call: str, when: int, tmp_path: Path) -> None:
    source_folder(tmp_path)
    status, _ = traced(tmp_path, "-e", WATCHED, "-e", f"inject={call}:error=EIO:when={when}")
    assert status == 1
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_under_a_ranks_file_leaves_nothing(call: str, tmp_path: Path) -> None:
    source = source_folder(tmp_path)
    split_id = split_folder(source, tmp_path / "sound", 2).split_id
    file = tmp_path / f".out.shardkit-stage-{split_id[:16]}" / "rank-00001-of-00002.safetensors"
    status, text = traced(
        tmp_path, "-P", str(file), "-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when=1"
    )
    assert "(INJECTED)" in text
    assert status == 1
    assert names(tmp_path) == ["sound", "source"]
