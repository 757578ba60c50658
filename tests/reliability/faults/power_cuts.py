"""Cuts the power: runs shardkit's commands on an ext4 of their own and keeps what its disk held.

    LD_PRELOAD=shim.so python -m tests.reliability.faults.power_cuts sound FOLDER STEP
    LD_PRELOAD=shim.so python -m tests.reliability.faults.power_cuts careless FOLDER

The filesystem lies in an image file.  At every STEPth call of a scene the command is killed, and
the image copied as it is: with what ext4 had written to its disk by then, without what it held in
memory.  The copy is mounted, its journal replayed, and the output must be absent, or whole and old,
or whole and new; once the command has said that it is done, it must be new.  The command run again
must reach new with nothing left beside it.  A disk that loses what it was given, before it is told
to flush, is not tried.  `careless` does so to a writer that syncs no files, which must be found
wrong.  Prints a line of JSON for each scene, as driver.py does.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.reliability.faults.driver import COUNT, KILL, KINDS, OFF, Fault, Ground, Report, run
from tests.reliability.faults.scenarios import SCENES, Scene

SIZE = 24 << 20  # bytes of the filesystem


class Disk:
    """An ext4 in an image file, and where it is mounted."""

    def __init__(self, folder: Path) -> None:
        self.image, self.cut, self.clean = (folder / name for name in ("image", "cut", "clean"))
        self.mount = folder / "mount"
        self.mount.mkdir()

    def make(self) -> None:
        """An empty filesystem."""
        self.image.unlink(missing_ok=True)
        with self.image.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)

    @contextmanager
    def mounted(self, image: Path) -> Iterator[None]:
        """The filesystem of an image, with nothing done that would save a careless writer."""
        options = "loop,noauto_da_alloc,commit=300"
        subprocess.run(["mount", "-o", options, image, self.mount], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", self.mount], check=True)


def cut_points(ground: Ground, step: int, turn: int) -> list[int]:
    """Before every `step`th call, and 0: after the last."""
    every = range(1, sum(ground.calls) + 1)
    return [*every[turn % step :: step], 0]


def cut(disk: Disk, ground: Ground, at: int) -> Iterator[tuple[str, str]]:
    """Cut the power there: the state, then a fault if it is none or cannot be recovered from."""
    command = ground.scene.command(ground.folder)
    shutil.copyfile(disk.clean, disk.image)
    with disk.mounted(disk.image):
        ended = run(command, Fault(KILL if at else COUNT, at))
        shutil.copyfile(disk.image, disk.cut)
    with disk.mounted(disk.cut):
        found = ground.found()
        yield found, "" if found != "MIXED" else f"cut at {at}: mixed"
        if ended.status != (-signal.SIGKILL if at else 0):
            yield found, f"cut at {at}: ended with {ended.status}: {ended.said}"
        if not at and found != "new":
            yield found, f"done, and yet {found} after the cut"
        if found != "new" or "--force" in ground.scene.arguments:
            ended = run(command, Fault(OFF, 0))
            if ended.status:
                yield found, f"cut at {at}: again: {ended.status}: {ended.said}"
        if ground.found() != "new" or ground.left():
            yield found, f"cut at {at}: again: {ground.found()}, left {ground.left()}"


def sweep(scene: Scene, disk: Disk, step: int, turn: int) -> Report:
    disk.make()
    with disk.mounted(disk.image):
        ground = Ground(scene, disk.mount)
        ground.fresh()
        shutil.rmtree(ground.template)
    shutil.copyfile(disk.image, disk.clean)
    report = Report(scene.name, calls=dict(zip(KINDS, ground.calls, strict=False)))
    for at in cut_points(ground, step, turn):
        report.points += 1
        for number, (name, fault) in enumerate(cut(disk, ground, at)):
            report.states[name] += number == 0
            if fault:
                report.faults.append(fault)
    return report


def skip_syncs_of_files() -> None:
    """What a writer does that syncs its folders and forgets its files."""
    fsync = os.fsync

    def careless(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            fsync(fd)

    os.fsync = os.fdatasync = careless  # type: ignore[assignment]


def main(what: str, folder: Path, step: int) -> None:
    disk = Disk(folder)
    scenes = SCENES
    if what == "careless":
        skip_syncs_of_files()
        scenes = [scene for scene in SCENES if scene.name in ("split", "split --force")]
    for turn, scene in enumerate(scenes):
        print(json.dumps(vars(sweep(scene, disk, step, turn * 5))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
