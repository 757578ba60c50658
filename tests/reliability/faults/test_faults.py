"""Killed, failed, out of room or raced at any call: the output is absent, or whole and old, or
whole and new, and the next run reaches new with nothing left beside it.

`pytest -m slow tests/reliability/faults` tries every call; an ordinary run tries a few of each.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_line import environment, run
from tests.helpers.split_helpers import split_folder
from tests.reliability.faults.scenarios import SCENES, both, old_reshard, old_shards, source, state

SHIM = Path(__file__).resolve().parent / "shim.c"
DRIVER, RACES, CUTS = (
    f"tests.reliability.faults.{name}" for name in ("driver", "races", "power_cuts")
)
SEEN = {  # calls that change a filesystem, by what the shim calls them
    "mkdir": "mkdir", "mkdirat": "mkdir", "write": "write", "pwrite64": "write",
    "writev": "write", "fallocate": "fallocate", "fsync": "fsync", "fdatasync": "fdatasync",
    "ftruncate": "ftruncate", "truncate": "ftruncate", "rename": "rename", "renameat": "rename",
    "renameat2": "rename", "unlink": "unlink", "rmdir": "rmdir", "chmod": "chmod",
    "fchmod": "chmod", "link": "link", "symlink": "link", "sync_file_range": "sync_file_range",
}  # fmt: skip
UNSEEN = {
    "creat", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice", "mknod", "mknodat",
    "linkat", "symlinkat", "fchmodat", "fchownat", "setxattr", "fsetxattr", "utimensat", "msync",
    "syncfs", "io_uring_setup", "openat2",
}  # fmt: skip


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that counts calls and fails at one of them, compiled."""
    if shutil.which("gcc") is None:
        pytest.skip("faults are made by a preloaded library, and there is no gcc to compile it")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", made, SHIM, "-ldl"], check=True)
    return made


@pytest.fixture
def ground() -> Iterator[Path]:
    """A folder in memory where there is one: the faults need no disk, and syncs cost nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def output(*command: object, preload: Path | None = None) -> list[Any]:
    """The lines of JSON that one of the drivers prints."""
    more = {"LD_PRELOAD": str(preload)} if preload else {}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment(PYTHONDONTWRITEBYTECODE="1", **more),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def swept(what: str, ground: Path, shim: Path, step: int) -> int:
    """Sweep every scene, print what was found, and count the points."""
    reports = output(DRIVER, what, ground, step, preload=shim)
    assert [report["scene"] for report in reports] == [scene.name for scene in SCENES]
    for report in reports:
        print(f"{report['scene']}: {report['points']} points, {report['states']}")
    assert [fault for report in reports for fault in report["faults"]] == []
    return sum(report["points"] for report in reports)


def test_a_command_killed_at_any_call_leaves_a_whole_output_or_none(
    ground: Path, shim: Path
) -> None:
    assert swept("kill", ground, shim, 35) >= 50


def test_a_command_whose_call_fails_says_so_in_a_line_and_leaves_nothing(
    ground: Path, shim: Path
) -> None:
    assert swept("fail", ground, shim, 151) >= 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call_is_killed_at(ground: Path, shim: Path) -> None:
    points = swept("kill", ground, shim, 1)
    print(f"{points} kill points")
    assert points >= 1000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_third_call_and_error_is_failed_with(ground: Path, shim: Path) -> None:
    points = swept("fail", ground, shim, 3)
    print(f"{points} errors")
    assert points >= 1500


def test_a_writer_that_replaces_file_by_file_is_found_mixed(ground: Path, shim: Path) -> None:
    (report,) = output(DRIVER, "broken", ground, preload=shim)
    assert report["states"]["MIXED"] >= 2
    assert any("mixed" in fault for fault in report["faults"])


@pytest.mark.parametrize("name", ["split", "merge --force", "reshard --force in place"])
def test_the_faults_reach_every_call_that_changes_a_filesystem(
    name: str, ground: Path, shim: Path, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("system calls are watched with strace, which is not installed")
    scene = next(scene for scene in SCENES if scene.name == name)
    scene.prepare(ground)
    log = tmp_path / "strace.log"
    done = subprocess.run(
        ["strace", "-f", "-y", "-E", f"LD_PRELOAD={shim}", "-E", "PYTHONDONTWRITEBYTECODE=1",
         "-o", log, "-e", f"trace=open,openat,unlinkat,mmap,{','.join([*SEEN, *UNSEEN])}",
         sys.executable, "-m", DRIVER, "once", ground, name],
        env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "exited with" not in log.read_text():
        pytest.skip(f"strace cannot trace here: {done.stderr[-200:]}")
    counted = json.loads(done.stdout.splitlines()[-1])
    assert traced(log.read_text()) == {kind: n for kind, n in counted.items() if n}


def traced(log: str) -> Counter[str]:
    """The calls of a trace that change files, by kind; a call that is in no kind is its own."""
    found: Counter[str] = Counter()
    for line in log.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None or re.match(r"write\([012]<", line.split(maxsplit=1)[1]):
            continue
        name, text = call[1], call[2]
        if name in ("open", "openat"):
            found["open"] += "O_CREAT" in text
        elif name == "unlinkat":
            found["rmdir" if "AT_REMOVEDIR" in text else "unlink"] += 1
        elif name == "mmap":
            found["mmap"] += "MAP_SHARED" in text and "PROT_WRITE" in text
        else:
            found[SEEN.get(name, name)] += 1
    return +found


def raced(races: int, locks: str, folder: Path) -> None:
    (report,) = output(RACES, folder, races, locks)
    print(report["ended"])
    assert report["faults"] == []
    assert sum(report["ended"].values()) == races


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_two_writers_never_mix_whether_or_not_there_are_locks(locks: str, ground: Path) -> None:
    raced(12, locks, ground)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_two_hundred_races_never_mix(locks: str, ground: Path) -> None:
    raced(204, locks, ground)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem, made as small as a test wants it by `resize`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk cannot be tried: no mount command")
    if done.returncode:
        pytest.skip(f"a full disk cannot be tried: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, pages: int) -> None:
    subprocess.run(
        ["mount", "-o", f"remount,size={pages * 4096}", str(disk)], check=True, capture_output=True
    )


def fill(disk: Path, command: list[str], pages: int, out: str) -> int:
    """Run a command with so many pages of room; its exit status, the output being whole or old."""
    before = state(disk / out), sorted(os.listdir(disk))
    used = os.statvfs(disk)
    resize(disk, used.f_blocks - used.f_bfree + pages)
    result = run(*command)
    resize(disk, 1024)
    assert result.exit_code in (0, 5), result.output
    if result.exit_code == 5:
        assert result.stderr.count("\n") == 1
        assert (state(disk / out), sorted(os.listdir(disk))) == before
    return result.exit_code


def roomy(folder: Path) -> None:
    """A source with a tokenizer far larger than its weights."""
    source(folder)
    (folder / "source" / "tokenizer.json").write_bytes(bytes(200_000))


def roomy_shards(folder: Path) -> None:
    roomy(folder)
    split_folder(folder / "source", folder / "shards", 2)
    shutil.rmtree(folder / "source")


SPLIT = ["split", "@source", "@out", "--tp", "2"]
RESHARD = ["reshard", "@shards", "@out", "--tp", "3"]
ROOMS = [
    ("split", roomy, SPLIT),
    ("split --force", both(roomy, old_shards), [*SPLIT, "--force"]),
    ("merge", roomy_shards, ["merge", "@shards", "@out"]),
    ("reshard --force", both(roomy_shards, old_reshard), [*RESHARD, "--force"]),
]


@pytest.mark.root
@pytest.mark.parametrize(("name", "prepare", "command"), ROOMS, ids=[room[0] for room in ROOMS])
def test_a_disk_that_is_too_small_at_fifty_sizes_is_left_as_it_was(
    name: str, prepare: Any, command: list[str], disk: Path
) -> None:
    prepare(disk)
    arguments = [part.replace("@", f"{disk}/") for part in command]
    codes = [fill(disk, arguments, pages, "out") for pages in range(1, 100)]
    assert codes.index(0) > 50
    assert set(codes[codes.index(0) :]) <= ({0} if "--force" in name else {0, 5})


# The power cut


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """A folder where filesystems in files can be made and mounted."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("the power is cut on an ext4 of its own, and there is no mkfs.ext4")
    image, mount = tmp_path / "trial", tmp_path / "trial-mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"the power cannot be cut here: {done.stderr.decode().strip()}")
    subprocess.run(["umount", mount], check=True)
    return tmp_path


def power_cut(what: str, ext4: Path, shim: Path, step: int) -> list[Any]:
    reports = output(CUTS, what, ext4, step, preload=shim)
    for report in reports:
        print(f"{report['scene']}: {report['points']} cuts, {report['states']}")
    return reports


@pytest.mark.root
def test_a_power_cut_leaves_a_whole_output_or_none(ext4: Path, shim: Path) -> None:
    reports = power_cut("sound", ext4, shim, 70)
    assert [report["scene"] for report in reports] == [scene.name for scene in SCENES]
    assert [fault for report in reports for fault in report["faults"]] == []


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_third_call_is_cut_off_at(ext4: Path, shim: Path) -> None:
    reports = power_cut("sound", ext4, shim, 3)
    assert [fault for report in reports for fault in report["faults"]] == []
    cuts = sum(report["points"] for report in reports)
    print(f"{cuts} cuts")
    assert cuts >= 200


@pytest.mark.root
def test_a_writer_that_syncs_no_files_is_found_broken_by_a_power_cut(
    ext4: Path, shim: Path
) -> None:
    for report in power_cut("careless", ext4, shim, 1000):
        assert "done, and yet MIXED after the cut" in report["faults"]
