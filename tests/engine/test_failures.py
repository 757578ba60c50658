"""A rank that dies or stops fails the requests in flight, names itself, and can be brought back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit import runtime
from shardkit.errors import EngineBusy, RanksError, RanksLost, RequestTimeout
from shardkit.timeouts import Timeouts
from tests.helpers.command_line import environment
from tests.helpers.rank_launcher import MARK, divisible, marked
from tests.helpers.runtime_helpers import cut

SLACK = 6.0
ENDLESS = 2000  # tokens: longer than a test waits, within the model's positions
SERVER = """
import sys, time
from shardkit import runtime

with runtime.launch(sys.argv[1], device="cpu") as engine, runtime.drain_on_sigterm(engine):
    handle = engine.submit([1, 2], max_tokens=int(sys.argv[2]), temperature=0)
    print("running", flush=True)
    try:
        time.sleep(60)
    except SystemExit:
        print(handle.done, flush=True)
        raise
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    cut(divisible(folder / "llama"), folder / "tp2", 2)
    return folder / "tp2"


@pytest.fixture(scope="module")
def threads() -> int:
    """How many threads there were before the engine."""
    return threading.active_count()


@pytest.fixture(scope="module")
def engine(threads: int, shards: Path) -> Iterator[runtime.Engine]:
    timeouts = Timeouts(collective=10, request=60)
    with runtime.launch(shards, device="cpu", timeouts=timeouts) as started:
        yield started


def begin(engine: runtime.Engine) -> runtime.Handle:
    """A request that goes on, of which some tokens have come."""
    handle = engine.submit([1, 2], max_tokens=ENDLESS, temperature=0)
    end = time.monotonic() + 30
    while engine.status().tokens == 0 and time.monotonic() < end:
        time.sleep(0.01)
    return handle


def test_a_fork_of_the_process_leaves_the_ranks_alone(engine: runtime.Engine) -> None:
    child = os.fork()
    if child == 0:  # this process must end here, whatever happens
        code = 1
        try:
            engine.submit([1], max_tokens=1)
        except RanksLost:
            engine.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert len(engine.submit([1], max_tokens=2, temperature=0).result(30).ids) == 2


def test_a_lost_rank_fails_all_in_flight_and_a_restart_brings_it_back(
    engine: runtime.Engine,
) -> None:
    expected = engine.submit([1, 2], max_tokens=8, temperature=0).result(30).ids
    handles = [begin(engine), engine.submit([3], max_tokens=ENDLESS, temperature=0)]
    hurried = engine.submit([3], max_tokens=ENDLESS, temperature=0, timeout=1.0)
    pids = list(engine.ranks.pids)
    os.kill(pids[1], signal.SIGSTOP)
    stopped = time.monotonic()
    with pytest.raises(RequestTimeout, match="did not finish within 1 s: rank 1 died or is stop"):
        hurried.result(30)
    assert time.monotonic() - stopped < 1 + SLACK
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    for handle in handles:
        with pytest.raises(RanksLost, match=r"^rank 1 was killed by SIGKILL$"):
            handle.result(30)
    assert time.monotonic() - killed < SLACK
    assert engine.status().failure == "rank 1 was killed by SIGKILL"
    with pytest.raises(RanksLost, match="rank 1 was killed"):
        engine.submit([1], max_tokens=1)
    engine.restart()
    assert engine.alive
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert engine.submit([1, 2], max_tokens=8, temperature=0).result(30).ids == expected
    assert not set(pids) & set(engine.ranks.pids)


@pytest.mark.slow
def test_a_stopped_rank_fails_each_request_within_its_own_time(engine: runtime.Engine) -> None:
    patient = begin(engine)
    os.kill(engine.ranks.pids[1], signal.SIGSTOP)
    stopped = time.monotonic()
    with pytest.raises(RanksLost, match="rank 1 died or is stopped"):
        patient.result(60)
    assert time.monotonic() - stopped < 10 + 2 * SLACK
    engine.restart()


def test_draining_and_closing_leave_nothing(threads: int, engine: runtime.Engine) -> None:
    first = engine.submit([1, 2], max_tokens=60, temperature=0)
    assert len(first.result(30).ids) == 60
    handle, pids = begin(engine), engine.ranks.pids
    stream = engine.stream([5], max_new_tokens=ENDLESS, do_sample=False)
    assert next(stream) >= 0
    assert not engine.drain(timeout=0.001)
    with pytest.raises(EngineBusy, match="drains"):
        engine.submit([1], max_tokens=1)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < SLACK
    for consume in (handle.result, lambda: list(stream)):
        with pytest.raises(RanksLost, match="the engine was closed"):
            consume()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert threading.active_count() <= threads
    with pytest.raises(RanksError, match="the engine was closed"):
        engine.restart()


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_sigterm_drains_and_a_second_ends(again: bool, shards: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tokens = 1500 if again else 100
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(shards), str(tokens)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**{MARK: str(tmp_path), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    if again:
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, "False\n" if again else "True\n"), errors
    assert not list(marked(tmp_path))
    assert not list(scratch.iterdir())
