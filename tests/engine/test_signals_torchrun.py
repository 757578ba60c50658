"""SIGKILL and SIGSTOP of each rank under torchrun: the others end in time and say which it was.

torchrun then starts the ranks once more, and they answer. `test_signals` has launched ranks.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.engine.test_signals import CASES, SLACK, TIMEOUTS
from tests.helpers.elastic_program import PROMPTS
from tests.helpers.rank_launcher import (
    MARK,
    Zygote,
    divisible,
    list_shared_memory,
    marked,
    said,
)
from tests.helpers.runtime_helpers import cut
from tests.helpers.stories_engine import continue_alone
from tests.helpers.struck_worker import STRIKE, ask_for_strike, read_strike

SECONDS = {"join": 60.0, "load": 30.0, "collective": TIMEOUTS.collective, "request": 30.0}
CAUSE = r"rank {} (died|is stopped|exited|was killed|stopped)"
BOTH = r"|ranks 0, {} died"  # at load torchrun's SIGTERM ends rank 0, so that it is missing, too
FAST = "SIGSTOP-decode-rank 1 of 2"
MARKED = [
    pytest.param(*case.values, id=case.id, marks=[] if case.id == FAST else pytest.mark.slow)
    for case in CASES
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return divisible(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def expected(source: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    return [continue_alone(model, ids, 6) for ids in PROMPTS]


def wait_for(condition: Callable[[], Any], seconds: float, where: Path) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), said(where)


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def read_all(out: Path, pattern: str) -> dict[int, Any]:
    """What ranks have left, by rank."""
    paths = [path for path in out.glob(pattern) if path.suffix != ".part"]
    return {int(path.name.split("-")[-1]): json.loads(path.read_text()) for path in paths}


@contextmanager
def torchrun_agent(zygote: Zygote, tmp_path: Path, **given: object) -> Iterator[int]:
    """The pid of torchrun's agent, with folders for what ranks leave; all is ended at the end."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    given |= {"folder": str(tmp_path / "tp"), "out": str(out), "timeouts": SECONDS}
    extra = {
        MARK: str(tmp_path), STRIKE: str(tmp_path / "strike"), "TMPDIR": str(scratch),
        # A rank that is forked while the agent's store looks up a name has its lock for ever.
        "RES_OPTIONS": "attempts:0",
    }  # fmt: skip
    try:
        yield zygote.fork("run_agent", given, extra, tmp_path / "log-agent")
    finally:
        for pid in marked(tmp_path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for_strike(tmp_path: Path, pid: int, number: signal.Signals, phase: str) -> float:
    """When a rank was struck: by itself, or here once all are idle."""
    if phase == "idle":
        wait_for((tmp_path / "out" / "idle").exists, 60, tmp_path)
        os.kill(pid, number)
        return time.monotonic()
    strike = tmp_path / "strike"
    wait_for(strike.with_suffix(".done").exists, 60, tmp_path)
    return read_strike(strike)


@pytest.mark.torchrun
@pytest.mark.parametrize(("world", "number", "phase", "rank"), MARKED)
def test_a_signal_ends_the_ranks_and_torchrun_starts_them_again(
    world: int, number: signal.Signals, phase: str, rank: int, zygote: Zygote, source: Path,
    expected: list[list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    cut(source, tmp_path / "tp", world)
    out, memory = tmp_path / "out", list_shared_memory()
    if phase != "idle":
        ask_for_strike(tmp_path / "strike", number, rank, phase, running=phase == "load")
    with torchrun_agent(zygote, tmp_path, world=world, phase=phase) as agent:
        wait_for(lambda: len(read_all(out, "pid-0-*")) == world, 60, tmp_path)
        pids = read_all(out, "pid-0-*")
        since = wait_for_strike(tmp_path, pids[rank], number, phase)
        others = [pid for other, pid in pids.items() if other != rank]
        wait_for(lambda: not any(map(is_running, others)), TIMEOUTS.collective + 20, tmp_path)
        check_said(read_all(out, "said-0-*"), number, phase, rank, since)
        if number == signal.SIGSTOP:
            os.kill(pids[rank], signal.SIGKILL)  # else the agent waits 30 s for it
        wait_for(lambda: not is_running(agent), 60, tmp_path)
        assert read_all(out, "said-1-*") == {0: expected}, said(tmp_path)
        log = (tmp_path / "log-agent").read_text()
        assert number == signal.SIGSTOP or f"(exitcode: -9) local_rank: {rank} " in log
        assert list_shared_memory() - memory == set()
        left = [path.name for path in (tmp_path / "scratch").iterdir()]
        assert not [name for name in left if "torchelastic" not in name]
        assert not list(marked(tmp_path))


def check_said(
    heard: dict[int, dict[str, Any]], number: signal.Signals, phase: str, rank: int, since: float
) -> None:
    """Those that spoke named the rank, in time.

    torchrun itself notices a death, names the rank, and ends the others by SIGTERM: at load before
    they can speak, and a server that is idle by draining it. What runs fails with the rank and the
    cause first.
    """
    cause = CAUSE + BOTH * (phase == "load" and number == signal.SIGKILL)
    for other, words in heard.items():
        assert re.search(cause.format(rank, rank), words["error"]), (other, words)
        assert words["at"] - since < TIMEOUTS.collective + SLACK, (other, words)
    if number == signal.SIGSTOP:
        assert heard
    if rank != 0 and phase in ("prefill", "decode"):
        assert 0 in heard
