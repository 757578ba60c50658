"""Runs shardkit's commands in forked children, with a fault at one of their calls; see shim.c.

    LD_PRELOAD=shim.so python -m tests.reliability.faults.driver kill|fail FOLDER STEP
    LD_PRELOAD=shim.so python -m tests.reliability.faults.driver broken FOLDER
    LD_PRELOAD=shim.so python -m tests.reliability.faults.driver once FOLDER SCENE

For every STEPth call of every scene: the command is killed before the call, or killed in the
middle of a write, or the call fails with an error, or writes only half.  Then the output must be
absent, or whole and old, or whole and new, and running the command again must reach new with
nothing left beside it.  Prints a line of JSON for each scene: points tried, states found, faults.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from shardkit.cli import main, merge, reshard, split  # noqa: F401  (loaded before the forks)
from shardkit.output import atomic as folders
from shardkit.output import writer as file_sink
from tests.reliability.faults.scenarios import SCENES, Contents, Scene, state

OFF, COUNT, KILL, FAIL, SHORT, TEAR = range(6)
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)
KINDS = (
    "open", "mkdir", "write", "fallocate", "fsync", "fdatasync", "ftruncate", "rename", "unlink",
    "rmdir", "sync_file_range", "chmod", "link", "none",
)  # fmt: skip
file_sink.JOURNAL_INTERVAL = 700  # a note for every few tensors
file_sink.WRITE_BACK_BYTES = 300
SHIM = ctypes.CDLL(None)


@dataclass(frozen=True)
class Fault:
    """What happens at which call: of all that change something, or of the writes only."""

    mode: int
    at: int
    code: int = 0

    def __str__(self) -> str:
        name = ("off", "count", "kill", "fail", "short write", "torn write")[self.mode]
        return f"{name} {errno.errorcode.get(self.code, '')} at {self.at}"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: the signal), what it said, its calls of each
    kind, and the kind of the call that failed.
    """

    status: int
    said: str
    calls: list[int]
    struck: str = ""


@dataclass
class Report:
    """What a scene's faults led to."""

    scene: str
    points: int = 0
    states: Counter[str] = field(default_factory=Counter)
    calls: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def run(command: list[str], fault: Fault) -> Ended:
    """The command in a child of its own, with the fault."""
    said, told = os.memfd_create("said"), os.memfd_create("calls")
    pid = os.fork()
    if pid == 0:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os._exit(child(command, fault, told))
    _, status = os.waitpid(pid, 0)
    text = os.pread(said, 1 << 20, 0).decode()
    calls, struck = json.loads(os.pread(told, 1 << 16, 0) or "[[], -1]")
    os.close(said)
    os.close(told)
    return Ended(os.waitstatus_to_exitcode(status), text, calls, KINDS[struck])


def child(command: list[str], fault: Fault, told: int) -> int:
    status: object = 0
    SHIM.shim_arm(fault.mode, ctypes.c_long(fault.at), fault.code)
    try:
        main.main(command, prog_name="shardkit")
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    calls = [SHIM.shim_count(kind) for kind in range(len(KINDS) - 1)]
    struck = SHIM.shim_struck()
    SHIM.shim_arm(OFF, ctypes.c_long(0), 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(told, json.dumps([calls, struck]).encode())
    return status if isinstance(status, int) else 98


class Ground:
    """A scene made ready once, to be copied for each fault."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.template = folder / "template"
        self.folder = folder / "ground"
        shutil.rmtree(self.template, ignore_errors=True)
        self.template.mkdir(parents=True)
        scene.prepare(self.template)
        self.old = state(self.template / scene.out)
        self.names = set(os.listdir(self.template)) | {scene.out}
        self.new, self.calls = self._whole()
        if scene.stopped:
            self._stop()

    def fresh(self) -> list[str]:
        """Copy the template; the command on the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder, copy_function=shutil.copyfile)
        for path in self.template.rglob("*.safetensors"):  # what a journal says of a source's times
            shutil.copystat(path, self.folder / path.relative_to(self.template))
        return self.scene.command(self.folder)

    def _whole(self) -> tuple[Contents, list[int]]:
        ended = run(self.fresh(), Fault(COUNT, 0))
        assert ended.status == 0, ended
        return state(self.folder / self.scene.out), ended.calls

    def _stop(self) -> None:
        """Kill the run before, so late that there is much to go on with, and keep what it left."""
        command = [part.replace("@", f"{self.folder}/") for part in self.scene.stopped]
        self.fresh()
        total = sum(run(command, Fault(COUNT, 0)).calls)
        self.fresh()
        ended = run(command, Fault(KILL, total * 2 // 3))
        assert ended.status == -signal.SIGKILL
        assert list(self.folder.glob(".*/journal.jsonl")), "nothing to go on with"
        shutil.rmtree(self.template)
        shutil.copytree(self.folder, self.template)
        self.calls = run(self.fresh(), Fault(COUNT, 0)).calls

    def left(self) -> list[str]:
        """What is there beside the scene's own folders."""
        return sorted(set(os.listdir(self.folder)) - self.names)

    def found(self) -> str:
        """Which whole state the output is in, or that it is none."""
        now = state(self.folder / self.scene.out)
        known = {"absent": None, "old": self.old, "new": self.new}
        return next((name for name, value in known.items() if now == value), "MIXED")


def killed(ground: Ground, at: int) -> Iterator[tuple[str, str]]:
    """Kill the command there: the state, then a fault if it is none or cannot be recovered from."""
    fault = Fault(KILL if at >= 0 else TEAR, abs(at))
    ended = run(ground.fresh(), fault)
    found = ground.found()
    yield found, "" if found != "MIXED" else f"{fault}: mixed"
    if ended.status != -signal.SIGKILL:
        yield found, f"{fault}: ended with {ended.status}: {ended.said}"
    more = ("--resume",) if at % 2 and "--resume" not in ground.scene.arguments else ()
    forced = "--force" in ground.scene.arguments
    if found != "new" or forced:
        ended = run(ground.scene.command(ground.folder, more), Fault(OFF, 0))
        if ended.status:
            yield found, f"{fault}: again: {ended.status}: {ended.said}"
    if ground.found() != "new" or ground.left():
        yield found, f"{fault}: again: {ground.found()}, left {ground.left()}"


def failed(ground: Ground, fault: Fault) -> Iterator[tuple[str, str]]:
    """Have a call fail: the state, then a fault if it is none, or is not told in one line."""
    ended = run(ground.fresh(), fault)
    found = ground.found()
    yield f"{found} after {ended.status}", "" if found != "MIXED" else f"{fault}: mixed"
    mild = fault.code == errno.EINTR or fault.mode == SHORT or ended.struck == "sync_file_range"
    if ended.status not in ((0, 5) if mild else (5,)):
        yield found, f"{fault}: ended with {ended.status}: {ended.said}"
    if ended.status and (ended.said.count("\n") != 1 or not ended.said.startswith("Error: ")):
        yield found, f"{fault}: said {ended.said!r}"
    if ended.status == 0 and found != "new":
        yield found, f"{fault}: ended with 0, {found}"
    kept = "--resume" in ground.scene.arguments
    if ground.left() and not (kept and resumable(ground)):
        yield found, f"{fault}: left {ground.left()}"
    if found != "new" or "--force" in ground.scene.arguments:
        ended = run(ground.scene.command(ground.folder), Fault(OFF, 0))
        if ended.status or ground.found() != "new" or ground.left():
            yield found, f"{fault}: again: {ended.status} {ended.said} {ground.found()}"


def resumable(ground: Ground) -> bool:
    """Whether all that is left is one stage with its journal."""
    return len(ground.left()) == len(list(ground.folder.glob(".*/journal.jsonl"))) == 1


def kill_points(ground: Ground) -> Iterator[Any]:
    """Before each call, and as a negative number in the middle of each write."""
    yield from range(1, sum(ground.calls) + 1)
    yield from (-at for at in range(1, ground.calls[KINDS.index("write")] + 1))


def fail_points(ground: Ground) -> Iterator[Any]:
    """Each error at each call, and each write cut short."""
    for at in range(1, sum(ground.calls) + 1):
        yield from (Fault(FAIL, at, code) for code in ERRORS)
    yield from (Fault(SHORT, at) for at in range(1, ground.calls[KINDS.index("write")] + 1))


def sweep(scene: Scene, what: str, folder: Path, step: int, turn: int) -> Report:
    """Every `step`th fault of a scene, the first the `turn`th; `late`: kills near the end only."""
    ground = Ground(scene, folder)
    report = Report(scene.name, calls=dict(zip(KINDS, ground.calls, strict=False)))
    points = list(fail_points(ground) if what == "fail" else kill_points(ground))
    if what == "late":
        points = points[sum(ground.calls) - 20 : sum(ground.calls)]
    for point in points[turn % step :: step]:
        report.points += 1
        found = failed(ground, point) if what == "fail" else killed(ground, point)
        for at, (name, fault) in zip(count(), found):
            report.states[name] += at == 0
            if fault:
                report.faults.append(fault)
    return report


def sweep_all(what: str, folder: Path, step: int) -> None:
    for turn, scene in enumerate(SCENES):
        report = sweep(scene, what, folder, step, turn * 5)
        print(json.dumps(vars(report)), flush=True)


def sweep_broken(folder: Path) -> None:
    """What a writer does that replaces file by file: the sweep has to find it wrong."""

    def by_file(stage: Path, out: Path) -> None:
        for path in sorted(stage.iterdir()):
            path.replace(out / path.name)

    folders.exchange_folders = by_file  # type: ignore[assignment]
    folders.can_exchange = lambda folder: True
    scene = next(scene for scene in SCENES if scene.name == "split --force")
    print(json.dumps(vars(sweep(scene, "late", folder, 1, 0))))


def once(folder: Path, name: str) -> None:
    """One command in this process, unharmed: the calls that were counted."""
    scene = next(scene for scene in SCENES if scene.name == name)
    SHIM.shim_arm(COUNT, ctypes.c_long(0), 0)
    main.main(scene.command(folder), prog_name="shardkit", standalone_mode=False)
    calls = {kind: SHIM.shim_count(at) for at, kind in enumerate(KINDS[:-1])}
    SHIM.shim_arm(OFF, ctypes.c_long(0), 0)
    print(json.dumps(calls))


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "broken":
        sweep_broken(Path(where))
    elif what == "once":
        once(Path(where), rest[0])
    else:
        sweep_all(what, Path(where), int(rest[0]))
