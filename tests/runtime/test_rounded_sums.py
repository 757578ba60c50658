"""Sums sent in bfloat16: as near as that rounding allows, in half the bytes, alike everywhere."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shardkit import runtime
from shardkit.cli import main
from shardkit.errors import UsageError
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.rounded_group import RoundedGroup, round_sums
from shardkit.runtime.distributed.rounded_sums import add_rounded
from shardkit.runtime.distributed.shared_memory import (
    ARRIVED,
    CALLS,
    LINE,
    SLOT_BYTES,
    SharedMemoryTransport,
    create_memory,
    explain_absence,
)
from shardkit.runtime.distributed.turns import TurnGroup, Turns
from tests.helpers.runtime_helpers import cut
from tests.helpers.torchrun import torchrun
from tests.runtime.test_shared_memory import TOKEN, run_both

UNIT = 2.0**-8  # half a unit in bfloat16's last place of 1
COUNTS = (1, 5, 4096, 600_001)
SUMS = """
import json, os, pathlib, sys, torch, zlib
import torch.distributed as dist
from shardkit import runtime
torch.set_num_threads(1)
group, sent = runtime.connect("cpu"), []

def record(name, at):
    call = getattr(dist, name)
    def run(*arguments, **options):
        sent.append([name, arguments[at].nbytes])
        return call(*arguments, **options)
    setattr(dist, name, run)

record("all_reduce", 0), record("all_gather", 1), record("all_to_all_single", 1)
shared, reports = group.transport, []
for count in COUNTS:
    seed = torch.Generator().manual_seed(count + group.tp_rank)
    x = torch.randn(count, generator=seed)
    crcs = []
    for group.transport in (shared, None):
        sent.clear()
        total = group.all_reduce(x.clone(), torch.bfloat16)
        crcs.append(zlib.crc32(total.numpy().tobytes()))
    reports.append({"crcs": crcs, "sent": [*sent]})
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(reports))
"""
DIFFERENT = """
import json, os, pathlib, sys, torch
from shardkit import runtime
from shardkit.errors import RanksError
dtypes = (None, torch.bfloat16)
try:
    runtime.load(sys.argv[1], reduce_dtype=dtypes[int(os.environ["RANK"])])
    outcome = "loaded"
except RanksError as error:
    outcome = str(error)
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(outcome))
"""


def make_parts(count: int, ranks: int) -> list[torch.Tensor]:
    seeds = (torch.Generator().manual_seed(count + rank) for rank in range(ranks))
    return [torch.randn(count, generator=seed) for seed in seeds]


def sum_in_turns(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    turns, size = Turns(len(parts)), len(parts)
    groups = [TurnGroup(rank, size, torch.device("cpu"), turns=turns) for rank in range(size)]

    def work(rank: int) -> torch.Tensor:
        return round_sums(groups[rank], torch.bfloat16).all_reduce(parts[rank].clone())

    return turns.run([lambda rank=rank: work(rank) for rank in range(size)])  # type: ignore[misc]


@pytest.mark.parametrize("ranks", [2, 3, 4, 16])
def test_a_sum_is_as_near_as_the_rounding_allows(ranks: int) -> None:
    parts = make_parts(4096, ranks)
    first, *others = sum_in_turns(parts)
    assert all(torch.equal(first, other) for other in others)
    exact = sum(part.double() for part in parts)
    size = sum(part.double().abs() for part in parts)
    share = UNIT if ranks == 2 else 2 * UNIT + UNIT**2
    error = (first.double() - exact).abs()
    assert bool((error <= share * size * (1 + ranks * 1e-6)).all())
    assert float(error.max()) > 1e-4  # it is rounded, and not to float32


def test_summands_are_added_in_the_wider_dtype() -> None:
    """In bfloat16 256 + 1 is 256."""
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert add_rounded(parts, torch.float32).tolist() == [258.0]
    assert add_rounded(parts[:2], torch.float32).tolist() == [257.0]


@pytest.mark.torchrun
@pytest.mark.skipif(bool(explain_absence()), reason=explain_absence())
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), 3])
def test_every_way_has_the_same_bits_and_half_the_bytes(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zlib

    monkeypatch.setenv("SHARDKIT_SHARED_MEMORY", "1")
    program = SUMS.replace("COUNTS", repr(COUNTS))
    code, outputs = torchrun(ranks, tmp_path, tmp_path, program)
    reports: list[Any] = outputs
    assert code == 0
    for at, count in enumerate(COUNTS):
        in_turns = sum_in_turns(make_parts(count, ranks))[0]
        crc = zlib.crc32(in_turns.numpy().tobytes())
        assert [each[at]["crcs"] for each in reports] == [[crc, crc]] * ranks
        part = -(-count // ranks)
        parts = [["all_to_all_single", 2 * part * ranks], ["all_gather", 2 * part]]
        expected = [["all_gather", 2 * count]] if ranks == 2 else parts
        assert [each[at]["sent"] for each in reports] == [expected] * ranks


@pytest.mark.skipif(bool(explain_absence()), reason=explain_absence())
@pytest.mark.parametrize("count", [0, 1, SLOT_BYTES // 2, SLOT_BYTES // 2 + 1])
def test_shared_memory_holds_two_bytes_for_each_number(count: int) -> None:
    fd = create_memory(2, TOKEN)
    sent: list[int] = []

    def work(side: SharedMemoryTransport) -> torch.Tensor:
        total = side.sum_rounded(torch.full((count,), 1.0 + side._rank / 3), torch.bfloat16)
        turn = side._words[LINE * side._rank + ARRIVED]
        halves = side._words[LINE * side._rank + CALLS :][:2]
        sent.append(sum(word & (1 << 48) - 1 for word in halves) if turn else 0)
        return total

    try:
        totals = run_both(fd, work)
    finally:
        os.close(fd)
    expected = torch.full((count,), 1.0) + torch.full((count,), 4 / 3).bfloat16().float()
    assert all(torch.equal(total, expected) for total in totals)
    assert sent == [2 * count] * 2


def test_what_is_no_wider_is_summed_as_it_is() -> None:
    turns = Turns(2)
    groups = [TurnGroup(rank, 2, torch.device("cpu"), turns=turns) for rank in range(2)]
    for dtype in (torch.float16, torch.int64):

        def work(group: TensorParallelGroup, dtype: torch.dtype = dtype) -> torch.Tensor:
            return round_sums(group, torch.bfloat16).all_reduce(torch.full((3,), 1025, dtype=dtype))

        totals: list[Any] = turns.run([lambda g=group: work(g) for group in groups])  # type: ignore[misc]
        assert [total.tolist() for total in totals] == [[2050] * 3] * 2


def test_a_model_rounds_its_own_sums_only() -> None:
    group = TensorParallelGroup(0, 1, torch.device("cpu"))
    rounded = round_sums(group, torch.bfloat16)
    assert isinstance(rounded, RoundedGroup)
    assert rounded.exact is group is group.exact is round_sums(group, None)
    rounded.all_reduce(torch.ones(1))
    rounded.all_gather(torch.ones(1), [1])
    assert group.counts == {"all_reduce": 1, "all_gather": 1}


@pytest.fixture(scope="module")
def stories_tp2(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "shards"
    cut(stories260k, folder, 2)
    return folder


def test_an_engine_sums_as_it_was_launched(stories_tp2: Path) -> None:
    logits = []
    for reduce_dtype in (None, torch.bfloat16):
        with runtime.launch(stories_tp2, dtype=torch.float32, reduce_dtype=reduce_dtype) as engine:
            logits.append(engine.logits([1, 403, 407, 261]).double())
    exact, rounded = logits
    share = float((exact - rounded).abs().max() / exact.abs().max())
    assert 1e-5 < share < 8 * UNIT


@pytest.mark.slow
@pytest.mark.torchrun
def test_ranks_that_would_sum_differently_refuse_each_other(
    stories_tp2: Path, tmp_path: Path
) -> None:
    _, outcomes = torchrun(2, stories_tp2, tmp_path, DIFFERENT)
    assert len(set(map(json.dumps, outcomes))) == 1
    assert "reduce_dtype" in outcomes[0]


def test_no_other_dtype_is_taken_for_sums(tmp_path: Path) -> None:
    for call in (runtime.load, runtime.launch):
        with pytest.raises(UsageError, match=r"'float16'; it must be torch\.bfloat16, or None"):
            call(tmp_path, reduce_dtype=torch.float16)
    for command in (["generate", "1"], ["serve"], ["bench"], ["verify"]):
        name, *rest = command
        options = [name, str(tmp_path), *rest, "--reduce-dtype", "float16"]
        result = CliRunner().invoke(main, options)
        assert result.exit_code == 2
        assert "'float16' is not 'bfloat16'" in result.output, result.output
