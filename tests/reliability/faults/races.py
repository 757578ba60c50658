"""Two shardkits at once to one output.

    python -m tests.reliability.faults.races FOLDER RACES locks|no-locks

Each race forks two commands that start within a few milliseconds of each other.  Whatever the
filesystem's locks do, the output must be one of the whole folders that the two would write, one
command must say that it succeeded, and nothing may be left beside the output.  Prints the number of
races by how they ended, and the faults, as JSON.
"""

import fcntl
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shardkit.cli import main, split  # noqa: F401  (loaded before the forks)
from shardkit.output import writer as file_sink
from tests.reliability.faults.scenarios import Contents, source, state

file_sink.JOURNAL_INTERVAL = 700
PAUSE = 0.02  # seconds; a command takes about as long


@dataclass(frozen=True)
class Race:
    """Two ways to write one output; `begun`: after a run to it was killed, `old`: over another."""

    name: str
    more: tuple[tuple[str, ...], tuple[str, ...]]
    old: bool = False
    begun: bool = False


RACES = [
    Race("the same split", (("--tp", "2"), ("--tp", "2"))),
    Race("two splits", (("--tp", "2"), ("--tp", "4"))),
    Race("two splits, forced", (("--tp", "2", "--force"), ("--tp", "4", "--force")), old=True),
    Race("after a killed run", (("--tp", "2"), ("--tp", "4")), begun=True),
    Race("resumed twice", (("--tp", "2", "--resume"), ("--tp", "2", "--resume")), begun=True),
    Race("resumed and begun anew", (("--tp", "2", "--resume"), ("--tp", "2")), begun=True),
]  # fmt: skip


def start(folder: Path, more: tuple[str, ...], delay: float = 0, dies: bool = False) -> int:
    """A split in a child of its own, its pid; `dies`: killed once it has a journal line or more."""
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if dies:
        file_sink.start_write_back = die  # type: ignore[assignment]
        file_sink.WRITE_BACK_BYTES = 4000
    time.sleep(delay)
    status: object = 0
    try:
        main.main(["split", f"{folder}/source", f"{folder}/out", *more], prog_name="shardkit")
    except SystemExit as end:
        status = end.code
    except BaseException:
        status = 99
    os._exit(status if isinstance(status, int) else 98)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "source":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def run(race: Race, folder: Path, known: list[Contents]) -> tuple[str, str]:
    """One race: how it ended, and what was wrong."""
    clear(folder)
    if race.old:
        assert finish(start(folder, ("--tp", "3"))) == 0
    if race.begun:
        assert finish(start(folder, ("--tp", "2"), dies=True)) == -signal.SIGKILL
        assert list(folder.glob(".*/journal.jsonl"))
    pids = [start(folder, more, random.uniform(0, PAUSE)) for more in race.more]
    codes = sorted(map(finish, pids))
    left = sorted(set(os.listdir(folder)) - {"source", "out"})
    ended = f"{race.name}: {codes}"
    wrong = []
    if state(folder / "out") not in known:
        wrong.append("the output is a mix, or nobody's")
    if codes not in ([0, 5], [0, 0]) or (codes == [0, 0] and not race.old):
        wrong.append(f"ended with {codes}")
    if left:
        wrong.append(f"left {left}")
    return ended, f"{race.name}: {'; '.join(wrong)}" if wrong else ""


def run_all(folder: Path, races: int) -> None:
    source(folder)
    known: list[Contents] = []
    for tp_size in ("2", "4"):
        assert finish(start(folder, ("--tp", tp_size))) == 0
        known.append(state(folder / "out"))
        clear(folder)
    ended: Counter[str] = Counter()
    faults = []
    for at in range(races):
        how, fault = run(RACES[at % len(RACES)], folder, known)
        ended[how] += 1
        faults += [fault] * bool(fault)
    print(json.dumps({"races": races, "ended": ended, "faults": faults}))


def no_locks(*_: object) -> None:
    """A filesystem that grants every lock, as some cluster filesystems do."""


if __name__ == "__main__":
    if sys.argv[3] == "no-locks":
        fcntl.flock = no_locks
    run_all(Path(sys.argv[1]), int(sys.argv[2]))
