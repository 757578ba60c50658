"""Runs a case in a forked child: what it says, how long it computes, and how much it grows.

The child shares what the parent has imported, so that a case costs milliseconds and nothing it
does outlives it.  Time is the processor's, which other work on the machine does not stretch.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shardkit.cli.merge
import shardkit.cli.plan
import shardkit.cli.reshard
import shardkit.cli.split
import shardkit.cli.verify
import shardkit.verification.levels  # noqa: F401
from tests.helpers.command_line import run

SECONDS = 2.0
MEGABYTES = 256
HANG = 120


@dataclass(frozen=True)
class Told:
    """What a command ended with."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def apart(work: Callable[[], Any]) -> tuple[Any, float]:
    """The JSON value that `work` returns in a child, and the megabytes it grew by."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(work, reader, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with {status}: {text}"
    value, grown = json.loads(text)
    return value, grown


def _child(work: Callable[[], Any], reader: int, writer: int) -> None:
    code = 1
    try:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(HANG)
        before = _peak()
        value = work()
        text = json.dumps([value, _peak() - before])
        code = 0
    except BaseException:
        text = traceback.format_exc()
    with os.fdopen(writer, "w") as pipe:
        pipe.write(text)
    sys.stdout.flush()
    os._exit(code)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def commands(*lines: list[str]) -> tuple[list[Told], float]:
    """Run commands one after another in one child; the growth is that of all of them."""

    def work() -> list[list[Any]]:
        told = []
        for line in lines:
            started = time.process_time()
            result = run(*line)
            seconds = time.process_time() - started
            told.append([result.exit_code, result.stdout, result.stderr, seconds])
        return told

    found, grown = apart(work)
    return [Told(*fields) for fields in found], grown


def listing(folder: Path) -> dict[str, int]:
    """Everything under a folder, and its size."""
    return {str(p.relative_to(folder)): p.lstat().st_size for p in folder.rglob("*")}


def check_told(told: Told, code: int, *words: str) -> None:
    """One printable line on stderr with these words if the command failed, and in good time."""
    assert told.code == code, told
    assert told.seconds < SECONDS, told
    assert "Traceback" not in told.stderr + told.stdout
    if code:
        assert told.stderr.count("\n") == 1, told.stderr
        assert told.stderr.startswith("Error: ")
        assert told.stderr[:-1].isprintable(), told.stderr
        for word in words:
            assert word in told.stderr, told.stderr
