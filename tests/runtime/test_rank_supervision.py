"""Ranks that a command, a program or torchrun has started: none outlives it, and it says why."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from shardkit import runtime
from shardkit.errors import RanksError
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.timeouts import Timeouts
from tests.helpers.command_line import SHARDKIT, environment
from tests.helpers.rank_launcher import MARK, divisible, list_shared_memory, marked
from tests.helpers.runtime_helpers import cut

SLACK = 5.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return divisible(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def shards(source: Path) -> Path:
    cut(source, source.parent / "tp2", 2)
    return source.parent / "tp2"


class Command:
    """A command that runs ranks without end, and the processes it has started."""

    def __init__(self, tmp_path: Path, *arguments: object) -> None:
        self.mark, self.scratch = tmp_path, tmp_path / "scratch"
        self.scratch.mkdir()
        self.before = list_shared_memory()
        self.began, self.startup = time.monotonic(), 0.0
        extra = {MARK: str(tmp_path), "TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*SHARDKIT, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(**extra),
        )  # fmt: skip

    def ranks(self, size: int) -> list[int]:
        """The process ids of the ranks, once all of them run."""
        end = time.monotonic() + 240
        while time.monotonic() < end:
            found = [pid for pid in sorted(marked(self.mark)) if b"engine.worker" in words(pid)]
            if len(found) == size:
                self.startup = time.monotonic() - self.began
                return sorted(found, key=rank_of)
            time.sleep(0.1)
        raise AssertionError("no ranks")

    def ended(self, since: float, within: float) -> tuple[int, str]:
        """Its exit code and what it said on stderr, if it ends in time and leaves nothing.

        An interpreter takes a part of the time to end that it took to load the libraries: little,
        unless the machine is busy.
        """
        _, said = self.process.communicate(timeout=120)
        assert time.monotonic() - since < within + self.startup / 2
        self.check_nothing_left(0)
        return self.process.returncode, said.decode()

    def check_nothing_left(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := set(marked(self.mark))) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left
        assert not list(self.scratch.iterdir())
        new = list_shared_memory() - self.before
        assert not [name for name in new if "torch" in name or "gloo" in name]


def words(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def rank_of(pid: int) -> int:
    found = re.search(rb'"RANK": "(\d+)"', words(pid))
    assert found
    return int(found[1])


@contextmanager
def generating(
    shards: Path, tmp_path: Path, *options: object
) -> Iterator[tuple[Command, list[int]]]:
    """A `generate` that has begun to speak and does not stop, and its ranks."""
    command = Command(
        tmp_path,
        "generate",
        shards,
        "1 2 3",
        "--max-new-tokens",
        10**6,
        "--device",
        "cpu",
        *options,
    )
    try:
        ranks = command.ranks(2)
        assert command.process.stdout is not None
        assert command.process.stdout.read(1)
        yield command, ranks
    finally:
        for pid in [command.process.pid, *marked(command.mark)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_names_a_rank_that_was_killed(rank: int, shards: Path, tmp_path: Path) -> None:
    with generating(shards, tmp_path) as (command, ranks):
        os.kill(ranks[rank], signal.SIGKILL)
        code, said = command.ended(time.monotonic(), SLACK)
    assert code == 7
    assert said.splitlines() == [f"Error: rank {rank} was killed by SIGKILL"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_names_a_rank_that_was_stopped(rank: int, shards: Path, tmp_path: Path) -> None:
    with generating(shards, tmp_path, "--timeout", 3) as (command, ranks):
        os.kill(ranks[rank], signal.SIGSTOP)
        code, said = command.ended(time.monotonic(), 3 + SLACK)
    assert code == 7
    assert re.fullmatch(rf"Error: rank {rank} died or is stopped: .*\n", said)


def kill(command: Command, ranks: list[int]) -> None:
    command.process.kill()


def kill_with_a_stopped_rank(command: Command, ranks: list[int]) -> None:
    os.kill(ranks[1], signal.SIGSTOP)
    command.process.kill()


@pytest.mark.parametrize(
    "how", [kill, pytest.param(kill_with_a_stopped_rank, marks=pytest.mark.slow)]
)
def test_no_rank_outlives_the_command(
    how: Callable[[Command, list[int]], None], shards: Path, tmp_path: Path
) -> None:
    with generating(shards, tmp_path) as (command, ranks):
        how(command, ranks)
        command.check_nothing_left(SLACK)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_interrupted_command_ends_its_ranks(
    number: int, code: int, options: tuple[str, ...], shards: Path, tmp_path: Path
) -> None:
    if options:  # which says nothing before its end
        command = Command(
            tmp_path, "generate", shards, "1 2 3", "--max-new-tokens", 10**6, "--device", "cpu",
            *options,
        )  # fmt: skip
        command.ranks(2)
        time.sleep(10)
        command.process.send_signal(number)
        found, said = command.ended(time.monotonic(), SLACK)
    else:
        with generating(shards, tmp_path) as (command, _):
            command.process.send_signal(number)
            found, said = command.ended(time.monotonic(), SLACK)
    assert found == code
    assert "Traceback" not in said


@pytest.mark.slow
def test_verify_names_a_rank_that_was_killed(shards: Path, source: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, "verify", shards, "--against", source, "--device", "cpu")
    ranks = command.ranks(2)
    os.kill(ranks[1], signal.SIGKILL)
    code, said = command.ended(time.monotonic(), 3 * SLACK)
    assert code == 7
    assert "Error: rank 1 was killed by SIGKILL" in said


@pytest.mark.slow
def test_ranks_outlive_the_thread_that_started_them(shards: Path) -> None:
    engines: list[runtime.Engine] = []
    thread = threading.Thread(target=lambda: engines.append(runtime.launch(shards, device="cpu")))
    thread.start()
    thread.join()
    with engines[0] as engine:
        time.sleep(1)
        assert engine.logits([1, 2]).shape == (1, 2, 60)


class Late(RankProcesses):
    """Ranks of which the last does not come, or differs."""

    worker = "tests.helpers.faulty_worker"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("killed", "rank 1 was killed by SIGKILL"),
        ("raises", "rank 1 exited with 1: ValueError: boom"),
        ("exits", "rank 1 exited with 0"),
        ("exits at once", "rank 1 exited with 0"),
        ("stopped", "rank 1 did not join within 20 s"),
        ("loops", "rank 1 did not join within 20 s"),
        ("torch", "rank 1 has torch 1.0, rank 0"),
    ],
)
def test_ranks_that_do_not_start_are_named(
    fault: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(RanksError, match=says):
        Late(2, "cpu", Timeouts(join=20, collective=3))


@pytest.mark.slow
def test_a_request_that_is_interrupted_ends_the_ranks(shards: Path) -> None:
    with runtime.launch(shards, device="cpu") as engine:
        stream = engine.stream([1, 2], max_new_tokens=10**6, do_sample=False)
        next(stream)
        pids = engine.ranks.pids
        began = time.monotonic()
    assert time.monotonic() - began < SLACK
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(RanksError):
        list(stream)


TORCHRUN = {
    "killed": (("killed", "between two calls"), r"rank +: 1 .*exitcode +: -9"),
    "raises": (("raises", "between two calls"), r"ValueError: boom"),
    "exits at once": (("exits at once", "between two calls"), r"rank 1 died"),
    "stopped": (("stopped", "between two calls"), r"Error: rank 1 died or is stopped"),
    "loops": (("loops", "between two calls"), r"Error: rank 1 \(.*\) did not reach"),
    "never joins": (("sleeps", "before joining"), r"Error: rank 1 did not join within 10 s"),
}


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHRUN)
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_names_the_rank(name: str, world: int, source: Path, tmp_path: Path) -> None:
    (fault, phase), says = TORCHRUN[name]
    folder = tmp_path / "shards"
    cut(source, folder, world)
    (tmp_path / "stamps").mkdir()
    plain = {
        "stamps": str(tmp_path / "stamps"), "folder": str(folder),
        "timeouts": {"join": 10.0, "load": 60.0, "collective": 3.0, "request": 60.0},
    }  # fmt: skip
    ranks = [plain, {**plain, "fault": fault, "phase": phase}, *[plain] * (world - 2)]
    (tmp_path / "ranks.json").write_text(json.dumps(ranks))
    extra = {MARK: str(tmp_path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world),
         "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
         "-m", "tests.helpers.rank_programs", str(tmp_path / "ranks.json")],
        capture_output=True, text=True, env=environment(**extra), timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(says, done.stdout + done.stderr, re.DOTALL), done.stdout + done.stderr
    assert not list(marked(tmp_path))
