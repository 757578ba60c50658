"""Memory that ranks share: gloo's sums, the same bits on every rank, no rank that waits forever."""

import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardkit.runtime.distributed import choose_transport, shared_memory
from shardkit.runtime.distributed.cores import count_cores
from shardkit.runtime.distributed.shared_memory import (
    SLOT_BYTES,
    TOKEN_BYTES,
    SharedMemoryTransport,
    create_memory,
    explain_absence,
    open_memory,
)
from tests.helpers.rank_launcher import Zygote, list_shared_memory, run_ranks
from tests.helpers.torchrun import torchrun

TOKEN = b"t" * TOKEN_BYTES
pytestmark = pytest.mark.skipif(bool(explain_absence()), reason=explain_absence())
COMPARE = """
import json, os, pathlib, random, sys, torch, zlib
from shardkit import runtime
torch.set_num_threads(1)
group = runtime.connect("cpu")
kind, shared = type(group.transport).__name__, group.transport
choose = random.Random(int(sys.argv[3]))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
worst, same = 0.0, True
for number in range(int(sys.argv[4])):
    dtype = choose.choice(DTYPES)
    shape = [choose.choice((1, 2, 3, 7)) for _ in range(choose.randint(1, 3))]
    shape[-1] *= choose.choice((1, 5, 64, 1000, 20000))
    seed = torch.Generator().manual_seed(1000 * number + group.tp_rank)
    x = (torch.randn(shape, generator=seed) * 50).to(dtype)
    size, scale = group.tp_size, x.abs().double()
    group.transport = shared
    sizes = [choose.choice((0, 1, x.shape[-1])) for _ in range(group.tp_size)]
    part, equal = x[..., :sizes[group.tp_rank]], [x.shape[-1]] * group.tp_size
    uneven = max(sizes) > 0 and group.all_gather(part, sizes)
    total, parts = group.all_reduce(x.clone()), group.all_gather(x, equal)
    first, rounded = group.broadcast(x.clone()), group.all_reduce(x.clone(), torch.bfloat16)
    bits = zlib.crc32(total.flatten().view(torch.uint8).numpy().tobytes())
    digests = group.all_gather(torch.tensor([bits]), [1] * group.tp_size)
    group.transport = None
    expected, others = group.all_reduce(x.clone()), group.all_gather(x, equal)
    if uneven is not False:
        same &= torch.equal(uneven, group.all_gather(part, sizes))
    largest = group.all_reduce(scale)
    if dtype in (torch.float32, torch.float64):  # added in the order of ranks everywhere
        same &= torch.equal(rounded, group.all_reduce(x.clone(), torch.bfloat16))
    same &= torch.equal(parts, others) and len(set(digests.tolist())) == 1
    same &= torch.equal(first, others[..., : x.shape[-1]])
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    error = (total.double() - expected.double()).abs()
    worst = max(worst, float((error - size * eps * largest).max()))
said = {"kind": kind, "same": same, "worst": worst}
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(said))
"""


def open_side(fd: int, rank: int, size: int, limit: float = 5.0) -> SharedMemoryTransport:
    memory = open_memory(os.getpid(), fd, size, TOKEN)
    return SharedMemoryTransport(memory, rank, [os.getpid()] * size, limit)


@pytest.fixture
def memory() -> Iterator[int]:
    fd = create_memory(2, TOKEN)
    yield fd
    os.close(fd)


def run_both(
    fd: int, work: Callable[[SharedMemoryTransport], Any], other: Callable[..., Any] | None = None
) -> list[Any]:
    """What two ranks, each a thread, return; an error is returned, too."""
    results: list[Any] = [None, None]

    def run(rank: int, task: Callable[[SharedMemoryTransport], Any]) -> None:
        try:
            results[rank] = task(open_side(fd, rank, 2, 1.0))
        except RuntimeError as error:
            results[rank] = str(error)

    tasks = enumerate((work, other or work))
    threads = [threading.Thread(target=run, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("count", [1, 5, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, SLOT_BYTES])
def test_sums_gathers_and_copies_of_any_length(memory: int, count: int) -> None:
    def work(side: SharedMemoryTransport) -> tuple[torch.Tensor, ...]:
        own = torch.arange(count, dtype=torch.float32) + side._rank * 0.5
        parts = side.gather_ranks(own.view(1, -1), [count, count])
        return side.sum_ranks(own), parts, side.copy_first(own.clone())

    expected = torch.arange(count, dtype=torch.float32)
    for total, parts, copied in run_both(memory, work):
        assert torch.equal(total, 2 * expected + 0.5)
        assert torch.equal(parts, torch.stack([expected, expected + 0.5]).view(1, -1))
        assert torch.equal(copied, expected)


def test_a_slot_is_not_written_before_it_is_read(memory: int) -> None:
    """One rank dawdles now and then; the other never sees, or destroys, another exchange."""
    choose = random.Random(1)

    def work(side: SharedMemoryTransport) -> bool:
        right = True
        for turn in range(300):
            if choose.random() < 0.05:
                threading.Event().wait(0.002)
            total = side.sum_ranks(torch.full((8,), float(turn + 1000 * side._rank)))
            right &= total.tolist() == [2.0 * turn + 1000] * 8
        return right

    assert run_both(memory, work) == [True, True]


def test_nothing_is_exchanged_for_no_elements(memory: int) -> None:
    def work(side: SharedMemoryTransport) -> list[int]:
        parts = side.gather_ranks(torch.empty(0, 2), [2, 2])
        return [*side.sum_ranks(torch.empty(0, 4)).shape, *parts.shape]

    assert run_both(memory, work) == [[0, 4, 0, 4]] * 2


def test_results_may_be_written_to_in_any_mode(memory: int) -> None:
    def work(side: SharedMemoryTransport) -> float:
        with torch.inference_mode():
            side.sum_ranks(torch.ones(3))
        total = side.sum_ranks(torch.ones(3)).mul_(2)
        with torch.inference_mode():
            return float(side.sum_ranks(total).sum())

    assert run_both(memory, work) == [24.0, 24.0]


@pytest.mark.parametrize("other", [torch.ones(4), torch.ones(3, dtype=torch.int64)])
def test_ranks_that_are_out_of_step_are_refused(memory: int, other: torch.Tensor) -> None:
    results = run_both(
        memory, lambda side: side.sum_ranks(torch.ones(3)), lambda side: side.sum_ranks(other)
    )
    assert results == [f"rank {rank} exchanges other tensors in this collective" for rank in (1, 0)]


def test_a_rank_that_does_not_come_is_named_in_time(memory: int) -> None:
    side = open_side(memory, 0, 2, limit=0.2)
    with pytest.raises(RuntimeError, match=r"rank 1 did not come within 0\.2 s"):
        side.sum_ranks(torch.ones(3))


def test_a_rank_that_closes_its_side_is_not_waited_for(memory: int) -> None:
    open_side(memory, 1, 2).close()
    with pytest.raises(RuntimeError, match="rank 1 has closed"):
        open_side(memory, 0, 2, limit=60).sum_ranks(torch.ones(3))


def test_a_process_that_ends_is_not_waited_for(memory: int) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        own = open_memory(os.getpid(), memory, 2, TOKEN)
        side = SharedMemoryTransport(own, 0, [os.getpid(), process.pid], 60)
        process.kill()
        with pytest.raises(RuntimeError, match="rank 1 has closed"):
            side.sum_ranks(torch.ones(3))


def test_what_a_rank_has_given_counts_though_it_is_gone(memory: int) -> None:
    """It may leave as soon as it has arrived in its last collective."""

    def leave(side: SharedMemoryTransport) -> float:
        total = float(side.sum_ranks(torch.ones(1)))
        side.close()
        return total

    def dawdle(side: SharedMemoryTransport) -> float:
        threading.Event().wait(0.05)
        return float(side.sum_ranks(torch.ones(1)))

    assert run_both(memory, leave, dawdle) == [2.0, 2.0]


def test_memory_of_another_host_is_not_taken_for_ours(memory: int) -> None:
    with pytest.raises(OSError, match="another host"):
        open_memory(os.getpid(), memory, 2, b"u" * TOKEN_BYTES)
    with pytest.raises(OSError, match="No such file"):
        open_memory(os.getpid(), 1 << 20, 2, TOKEN)


def test_only_processors_whose_stores_stay_in_order_share_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "memory ordering of x86, and this is aarch64" in explain_absence()


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("100000 100000", 1)])
def test_cores_are_those_that_a_container_may_use(
    quota: str, cores: int | None, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert count_cores(tmp_path / "cpu.max") == (cores or len(os.sched_getaffinity(0)))
    assert count_cores(tmp_path / "absent") == len(os.sched_getaffinity(0))


def test_the_switch_and_the_cores_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_transport, "count_cores", lambda: 2)
    explain = choose_transport._explain_refusal
    assert (explain(2), explain(3)) == ("", "2 cores for 3 ranks")
    monkeypatch.setenv(choose_transport.SWITCH, "1")
    assert explain(3) == ""
    assert explain(1) == "one rank alone"
    monkeypatch.setenv(choose_transport.SWITCH, "0")
    assert explain(2) == "SHARDKIT_SHARED_MEMORY is 0"


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("ranks", "cases", "seed"),
    [
        (2, 60, 7),
        *(pytest.param(n, 280, s, marks=pytest.mark.slow) for n in (2, 3, 4) for s in range(12)),
    ],
)
def test_real_ranks_have_what_gloo_would_give_them(
    ranks: int, cases: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,080 in all."""
    monkeypatch.setenv(choose_transport.SWITCH, "1")
    code, said = torchrun(ranks, tmp_path, tmp_path, COMPARE, str(seed), str(cases))
    assert code == 0
    assert [each["kind"] for each in said] == ["SharedMemoryTransport"] * ranks
    assert all(each["same"] and each["worst"] <= 0 for each in said), said


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("seed", range(7))
def test_a_rank_killed_at_any_moment_is_named_and_leaves_nothing(
    world: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 210 moments in all."""
    monkeypatch.setenv(choose_transport.SWITCH, "1")
    choose, zygote, before = random.Random(seed), Zygote(), list_shared_memory()
    seconds = {"join": 30.0, "load": 30.0, "collective": 10.0, "request": 30.0}
    try:
        for moment in range(10):
            faulty = choose.randrange(world)
            plain: dict[str, Any] = {
                "timeouts": seconds,
                "elements": str(4 ** choose.randint(1, 11)),
            }
            ranks = [{"arguments": plain} for _ in range(world)]
            wrong = {"fault": "killed", "phase": "in a collective"}
            ranks[faulty] = {"arguments": {**plain, **wrong, "delay": str(choose.random() / 4)}}
            folder = tmp_path / str(moment)
            folder.mkdir()
            for rank, one in run_ranks(zygote, folder, ranks, faulty, limit=120).items():
                assert one.code == 7, (moment, rank, one)
                assert f"rank {faulty} died" in one.said, (moment, rank, one)
    finally:
        zygote.close()
    assert list_shared_memory() <= before


def test_memory_is_as_long_as_it_must_be(memory: int) -> None:
    own = open_memory(os.getpid(), memory, 2, TOKEN)
    assert isinstance(own, mmap.mmap)
    assert len(own) == shared_memory.measure_memory(2) == mmap.PAGESIZE + 4 * SLOT_BYTES
