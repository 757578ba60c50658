"""SIGKILL and SIGSTOP of each rank at load, in a prefill, in decoding and at idle.

Whatever was asked fails in time and names the rank, a restart brings the engine back, and nothing
is left. Here the ranks are launched; `test_signals_torchrun` is the same under torchrun.
"""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shardkit import runtime
from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.engine.messages import load_request
from shardkit.timeouts import Timeouts
from tests.helpers.rank_launcher import MARK, divisible, list_shared_memory, marked
from tests.helpers.runtime_helpers import cut
from tests.helpers.struck_worker import STRIKE, StruckRanks, ask_for_strike, read_strike

pytestmark = pytest.mark.slow
TIMEOUTS = Timeouts(join=120, load=40, collective=4, request=30)
SLACK = 8.0  # seconds beyond a collective's, in which the others find out who is missing
SPARE = 4  # descriptors that Python or torch may have at times
PHASES = ("load", "prefill", "decode", "idle")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
CAUSES = {
    signal.SIGKILL: r"rank {} was killed by SIGKILL",
    signal.SIGSTOP: r"rank {} (died or is stopped: no sign of life|is stopped)",
}
CASES = [
    pytest.param(world, number, phase, rank, id=f"{number.name}-{phase}-rank {rank} of {world}")
    for world in (2, 3, 4)
    for number in SIGNALS
    for phase in PHASES
    for rank in range(world)
]
PROMPTS = [[1, 2], [3, 4, 5]]


class Watched:
    """An engine, and what its host had before the ranks had started."""

    def __init__(self, engine: runtime.Engine, folder: Path, shm: set[str]) -> None:
        self.engine, self.folder, self.shm = engine, folder, shm
        self.expected = self.answer()
        self.descriptors = len(os.listdir("/proc/self/fd"))

    def answer(self) -> list[tuple[int, ...]]:
        handles = [self.engine.submit(ids, max_tokens=6, temperature=0) for ids in PROMPTS]
        return [handle.result(60).ids for handle in handles]

    def check_nothing_left(self, pids: list[int]) -> None:
        """No process, memory, descriptor or file but those of the ranks that run."""
        assert set(marked(self.folder)) == set(self.engine.ranks.pids)
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert list_shared_memory() - self.shm == set()
        assert len(os.listdir("/proc/self/fd")) < self.descriptors + SPARE
        assert not list((self.folder / "scratch").iterdir())


@pytest.fixture(scope="module")
def watched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """An engine of so many ranks, each of which signals itself where a file says."""
    world = request.param
    folder = tmp_path_factory.mktemp("signals")
    (folder / "scratch").mkdir()
    cut(divisible(folder / "llama"), folder / "tp", world)
    shm = list_shared_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(folder))
        patch.setenv(STRIKE, str(folder / "strike"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(tempfile, "tempdir", str(folder / "scratch"))
        patch.setenv("TMPDIR", str(folder / "scratch"))
        start = partial(StruckRanks, world, "cpu", TIMEOUTS)
        load = load_request(folder / "tp")
        with runtime.Engine(folder / "tp", start, load) as engine:
            yield Watched(engine, folder, shm)
    assert not list(marked(folder))


@pytest.mark.parametrize(
    ("watched", "number", "phase", "rank"), CASES, indirect=["watched"], scope="module"
)
def test_a_signal_fails_what_runs_and_a_restart_brings_all_back(
    number: signal.Signals, phase: str, rank: int, watched: Watched
) -> None:
    engine = watched.engine
    if not engine.alive:  # another test has failed
        engine.restart()
    pids = engine.ranks.pids
    says = CAUSES[number].format(rank)
    if phase == "idle":
        strike_at_idle(engine, pids[rank], number)
        since = time.monotonic()
    else:
        ask_for_strike(watched.folder / "strike", number, rank, phase)
    if phase == "load":
        with pytest.raises(RanksError, match=says):
            engine.restart()
    else:
        for handle in ask(engine, phase):
            with pytest.raises(RanksLost, match=says):
                handle.result(60)
    if phase != "idle":
        since = read_strike(watched.folder / "strike")
    assert time.monotonic() - since < TIMEOUTS.collective + SLACK
    assert not engine.alive
    assert re.search(says, engine.status().failure)
    engine.restart()
    assert watched.answer() == watched.expected
    watched.check_nothing_left(pids)


def strike_at_idle(engine: runtime.Engine, pid: int, number: signal.Signals) -> None:
    """Signal a rank; a dead one is missed though nothing is asked."""
    os.kill(pid, number)
    end = time.monotonic() + SLACK
    while number == signal.SIGKILL and engine.alive and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.alive == (number == signal.SIGSTOP)


def ask(engine: runtime.Engine, phase: str) -> list[runtime.Handle]:
    """Requests that run when the rank is struck."""
    if not engine.alive:
        with pytest.raises(RanksLost):
            engine.submit([1])
        return []
    prompts: list[list[int]] = [[5] * 40, [6] * 30] if phase == "prefill" else PROMPTS
    options: dict[str, Any] = {"max_tokens": 1500, "temperature": 0}
    return [engine.submit(ids, **options) for ids in prompts]
