"""Ranks that take turns: gloo's bits, no rank that waits for ever, a state for each."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.turns import TurnGroup, Turns, add_in_ring
from tests.helpers.torchrun import torchrun

DTYPES = ("float64", "float32", "bfloat16", "float16")
SIZES = (1, 5, 64, 1000, 4099, 300_001)
REAL_SUMS = """
import json, os, pathlib, sys, torch
from safetensors.torch import save_file
from shardkit import runtime
torch.set_num_threads(1)
group = runtime.connect("cpu")
for name in DTYPES:
    for size in SIZES:
        seed = torch.Generator().manual_seed(group.tp_rank * 1000 + size)
        x = torch.randn(size, generator=seed, dtype=torch.float64).to(getattr(torch, name))
        if group.tp_rank == 0:
            save_file({"x": group.all_reduce(x)}, f"{sys.argv[2]}/{name}-{size}.safetensors")
        else:
            group.all_reduce(x)
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text("{}")
"""


def groups(size: int) -> tuple[Turns, list[TurnGroup]]:
    turns = Turns(size)
    device = torch.device("cpu")
    return turns, [TurnGroup(rank, size, device, turns=turns) for rank in range(size)]


def run_ranks(size: int, work: Callable[[TurnGroup], Any]) -> list[Any]:
    turns, ranks = groups(size)
    return turns.run([lambda group=group: work(group) for group in ranks])  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [3])
def test_a_sum_has_the_bits_of_real_ranks(ranks: int, tmp_path: Path) -> None:
    program = REAL_SUMS.replace("DTYPES", repr(DTYPES)).replace("SIZES", repr(SIZES))
    code, _ = torchrun(ranks, tmp_path, tmp_path, program)
    assert code == 0
    plain = 0
    for name in DTYPES:
        for size in SIZES:
            parts = [
                torch.randn(
                    size,
                    generator=torch.Generator().manual_seed(rank * 1000 + size),
                    dtype=torch.float64,
                ).to(getattr(torch, name))
                for rank in range(ranks)
            ]
            real = load_file(tmp_path / f"{name}-{size}.safetensors")["x"]
            assert torch.equal(add_in_ring(parts), real), (name, size)
            plain += not torch.equal(sum(parts[1:], parts[0]), real)
    assert plain > len(DTYPES)  # the order of additions does matter


def test_every_rank_has_the_sum_and_each_part_of_a_gather() -> None:
    def work(group: TurnGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rank = group.tp_rank
        total = group.all_reduce(torch.full((2, 3), float(rank + 1)))
        whole = group.all_gather(torch.full((2, rank + 1), float(rank)), [1, 2, 3, 4, 5])
        return total, whole, group.broadcast(torch.tensor([rank]))

    for total, whole, first in run_ranks(5, work):
        assert total.tolist() == [[15.0] * 3] * 2
        assert whole[1].tolist() == [0] + [1] * 2 + [2] * 3 + [3] * 4 + [4] * 5
        assert first.tolist() == [0]


def test_one_rank_runs_at_a_time() -> None:
    running: list[int] = []
    most = 0

    def work(group: TurnGroup) -> None:
        nonlocal most
        for _ in range(20):
            running.append(group.tp_rank)
            most = max(most, len(running))
            running.remove(group.tp_rank)
            group.all_reduce(torch.ones(8))

    run_ranks(16, work)
    assert most == 1


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_a_rank_that_raises_ends_the_others(failing: int) -> None:
    before = threading.active_count()

    def work(group: TurnGroup) -> None:
        group.all_reduce(torch.ones(1))
        if group.tp_rank == failing:
            raise ValueError("boom")
        group.all_reduce(torch.ones(1))

    with pytest.raises(RanksError, match=f"^rank {failing}: ValueError: boom$"):
        run_ranks(4, work)
    assert threading.active_count() == before


@pytest.mark.parametrize("early", [0, 1, 2])
def test_a_rank_that_ends_before_the_others_is_named(early: int) -> None:
    def work(group: TurnGroup) -> None:
        if group.tp_rank != early:
            group.all_reduce(torch.ones(1))

    with pytest.raises(RanksError, match=rf"rank {early}: ended, but rank \d waits .* all_reduce"):
        run_ranks(3, work)


def test_ranks_in_different_collectives_are_named() -> None:
    def work(group: TurnGroup) -> None:
        group.all_reduce(torch.ones(1 + group.tp_rank // 2))

    with pytest.raises(RanksError, match=r"rank 2: is in all_reduce .*\[2\], but rank 0 .*\[1\]"):
        run_ranks(3, work)


def test_each_rank_has_its_own_default_dtype_and_random_state() -> None:
    dtypes = [torch.float32, torch.float64, torch.float32]

    def work(group: TurnGroup) -> tuple[torch.dtype, list[float]]:
        assert torch.get_default_dtype() == torch.float32
        torch.set_default_dtype(dtypes[group.tp_rank])
        torch.manual_seed(1)
        group.all_reduce(torch.ones(1, dtype=torch.float32))
        numbers = [torch.rand(1, dtype=torch.float32).item() for _ in range(2)]
        group.all_reduce(torch.ones(1, dtype=torch.float32))
        return torch.get_default_dtype(), numbers

    found = run_ranks(3, work)
    assert [dtype for dtype, _ in found] == dtypes
    assert found[0][1] == found[1][1] == found[2][1]
    assert torch.get_default_dtype() == torch.float32


def test_a_group_runs_again_after_a_failure() -> None:
    turns, ranks = groups(2)

    def fail() -> None:
        raise ValueError("boom")

    with pytest.raises(RanksError):
        turns.run([fail, lambda: ranks[1].all_reduce(torch.ones(1))])
    done = turns.run([lambda g=group: g.all_reduce(torch.ones(1)) for group in ranks])  # type: ignore[misc]
    assert [x.item() for x in done] == [2.0, 2.0]


def test_a_task_that_gets_no_memory_decides_nothing() -> None:
    """Whatever the others would have computed may be right: it is not a verdict."""
    with pytest.raises(RanksLost, match="rank 1: no memory is free"):
        Turns(2).run([lambda: torch.empty(1), lambda: torch.empty(1 << 58)])
