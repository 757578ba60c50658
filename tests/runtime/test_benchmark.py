"""`shardkit bench`: what it runs, how it sums up, and what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from shardkit.errors import UsageError
from shardkit.runtime.benchmark import run_contenders as runs
from shardkit.runtime.benchmark.chart import render_chart
from shardkit.runtime.benchmark.contenders import (
    Contender,
    Workload,
    list_contenders,
    read_workload,
)
from shardkit.runtime.benchmark.measure_rank import _run_batch
from shardkit.runtime.benchmark.timed_transport import TimedTransport
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.torch_transport import TorchTransport
from shardkit.runtime.loader import load
from tests.helpers.command_line import run
from tests.helpers.real_inputs import shared
from tests.helpers.runtime_helpers import cut

FOLDER = Path("model")


@pytest.fixture(scope="module")
def shards(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A trained model over one rank and over two."""
    base = tmp_path_factory.mktemp("bench")
    for size in (1, 2):
        cut(stories260k, base / str(size), size)
    return {size: base / str(size) for size in (1, 2)}


def measured(seconds: float, wait: float | None) -> dict[str, Any]:
    run = {"batch": 4, "first_token_seconds": 2 * seconds, "token_seconds": seconds}
    loading = {"load_seconds": seconds, "read_bytes": 10, "memory_bytes": None}
    return {**loading, "runs": [{**run, "collective_seconds": wait}]}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three rounds of two contenders, of which the second has a slower rank."""
    rounds = {"unsharded": iter([2.0, 1.0, 4.0]), "shards": iter([1.0, 3.0, 0.5])}
    order = []

    def measure(contender: Contender, _workload: Workload) -> list[dict[str, Any]]:
        order.append(contender.name)
        seconds = next(rounds[contender.kind])
        if contender.kind == "unsharded":
            return [measured(seconds, None)]
        return [measured(seconds, 0.25), measured(2 * seconds, 0.125)]

    monkeypatch.setattr(runs, "_run_round", measure)
    contenders = [Contender("unsharded", FOLDER, 1), Contender("shards", FOLDER, 2)]
    report = runs.run_contenders(contenders, Workload(batches=(4,)), 3)
    assert order == ["unsharded", "shardkit tp 2"] * 3
    return report


def test_a_report_has_the_median_of_the_slowest_rank(report: dict[str, Any]) -> None:
    whole, ours = report["contenders"]
    assert whole["load_seconds"] == {"median": 2.0, "least": 1.0, "most": 4.0}
    assert ours["load_seconds"] == {"median": 2.0, "least": 1.0, "most": 6.0}
    assert ours["read_bytes"]["median"] == 10
    assert ours["memory_bytes"] is None
    assert ours["runs"][0]["batch"] == 4
    assert ours["runs"][0]["collective_seconds"]["median"] == 0.25
    assert whole["runs"][0]["collective_seconds"] is None
    assert json.loads(json.dumps(report)) == report


def test_a_chart_has_a_bar_for_each_contender(report: dict[str, Any]) -> None:
    root = ElementTree.fromstring(render_chart(report))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert texts.count("shardkit tp 2") == 2
    assert "1.00 x" in texts
    assert any(text.endswith("12% in collectives") for text in texts)
    bars = [bar for bar in root.iter(f"{space}rect") if bar.get("class") == "bar"]
    assert len(bars) == 4
    assert all(float(bar.get("width", "")) >= 0 for bar in bars)


def test_a_workload_is_read_as_it_was_written() -> None:
    workload = Workload((1, 8), 16, 4, "bfloat16", "cpu")
    assert read_workload(json.loads(json.dumps(workload.to_json()))) == workload


def test_contenders_are_the_baseline_then_ours_then_the_peer(
    shards: dict[int, Path], stories260k: Path
) -> None:
    folders = [shards[2], shards[1]]
    names = [each.name for each in list_contenders(folders, stories260k, ["transformers"])]
    assert names == ["unsharded", "shardkit tp 1", "shardkit tp 2", "transformers tp 2"]
    assert [each.ranks for each in list_contenders(folders, None, [])] == [1, 2]
    names = [
        each.name for each in list_contenders([shards[2]], stories260k, ["transformers"], True)
    ]
    assert names == [
        "unsharded", "shardkit tp 2", "transformers tp 2", "unsharded compiled",
        "shardkit tp 2 compiled",
    ]  # fmt: skip


def test_what_cannot_be_compared_is_refused(shards: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two shard folders have 2 ranks"):
        list_contenders([shards[2], shards[2]], None, [])
    with pytest.raises(UsageError, match="--peer needs --against"):
        list_contenders([shards[2]], None, ["transformers"])
    cut(shared("models/stories260K-sharded"), tmp_path / "other", 1)
    with pytest.raises(UsageError, match="of different checkpoints"):
        list_contenders([shards[2], tmp_path / "other"], None, [])


def test_collectives_are_timed_and_unchanged() -> None:
    class Doubling:
        def sum_ranks(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        def sum_rounded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return 2 * x.to(dtype).to(x.dtype)

        def gather_ranks(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
            return torch.cat([x] * len(sizes), -1)

        def copy_first(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def close(self) -> None:
            pass

    group = TensorParallelGroup(0, 2, torch.device("cpu"), transport=Doubling())
    timer = TimedTransport.install(group)
    assert timer is not None
    ones = torch.ones(3)
    assert torch.equal(group.all_reduce(ones), 2 * ones)
    assert torch.equal(
        group.all_reduce(ones / 3, torch.bfloat16), 2 * (ones / 3).bfloat16().float()
    )
    assert torch.equal(group.all_gather(ones, [3, 3]), torch.ones(6))
    assert torch.equal(group.broadcast(ones), ones)
    assert timer.take_seconds() > 0
    assert timer.take_seconds() == 0
    assert TimedTransport.install(TensorParallelGroup(0, 1, torch.device("meta"))) is None


def test_collectives_are_those_of_a_new_token_alone(shards: dict[int, Path]) -> None:
    """Not those of the prompt, nor of what ran before: here each forward counts for a second."""

    class ForwardCount(TimedTransport):
        def add(self, *_: object) -> None:
            self._seconds += 1

    model, count = load(shards[1]), ForwardCount(TorchTransport(None))
    model.register_forward_hook(count.add)
    run = _run_batch(model, 2, Workload((2,), 4, 3), count)
    assert run["collective_seconds"] == 1


def test_the_command_measures_a_model(shards: dict[int, Path], tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    options = ("--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--plot", chart)
    done = run("bench", shards[1], "--json", *options)
    assert done.exit_code == 0, done.stderr
    (contender,) = json.loads(done.stdout)["contenders"]
    weights = sum(path.stat().st_size for path in shards[1].glob("*.safetensors"))
    assert weights <= contender["read_bytes"]["median"] < 4 * weights
    # A token's time is a difference of two runs: of so short ones it may even be below zero.
    assert isinstance(contender["runs"][0]["token_seconds"]["median"], float)
    assert contender["load_seconds"]["median"] > 0
    assert ElementTree.fromstring(chart.read_text()).tag.endswith("svg")
    assert "exists" in run("bench", shards[1], *options).stderr


@pytest.mark.slow
@pytest.mark.torchrun
def test_the_command_compares_ranks_with_the_unsharded_model(
    shards: dict[int, Path], stories260k: Path
) -> None:
    options = ["--rounds", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--batch", "3"]
    options += ["--compile"]
    done = run("bench", shards[2], "--against", stories260k, *options)
    assert done.exit_code == 0, done.stderr
    assert "shardkit tp 2 compiled" in done.stdout
    assert "unsharded compiled" in done.stdout
    assert "batch 3" in done.stdout


@pytest.mark.slow
def test_too_long_a_prompt_is_an_error_of_one_line(shards: dict[int, Path]) -> None:
    done = run("bench", shards[1], "--rounds", "1", "--prompt-tokens", "9000")
    assert done.exit_code != 0
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("round ")]
    assert "need 9033 positions, and the model has 512" in line
