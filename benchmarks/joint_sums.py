"""Decoding with attention and MLP summed together, each by itself, or one during the other.

    python -m benchmarks.joint_sums [--tp 2] [--layers 16] [--batch 1] [--rounds 7] [--json]

A Phi of random weights (float32, hidden size 1024), whose layers add what attention and MLP output
to their input. Ranks started by torchrun load it once and decode in three ways, in turns: with one
sum a layer, as its recipe says; with two; and with two of which the attention's runs while the MLP
computes. Ranks exchange over gloo, and over memory that they share, which runs nothing in the
background. Seconds a token are the median of a round's steps, on the slowest rank. That all ways
give the same logits, up to rounding, is checked first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

import shardkit
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.joint_sum import (
    EarlierGroup,
    JointGroup,
    find_group,
    separate_sums,
    set_group,
)
from shardkit.runtime.loader import load

SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "vocab_size": 16000, "max_position_embeddings": 512,
}  # fmt: skip
PROMPT_TOKENS, STEPS = 16, 24
JOINT, SEPARATE, OVERLAPPED = "one sum", "two sums", "two sums, one of them meanwhile"
GLOO, SHARED = "gloo", "shared memory"
Ways = dict[str, Callable[[], AbstractContextManager[object]]]


class StartedGroup(TensorParallelGroup):
    """The group of a module whose sum is started and not waited for."""

    def __init__(self, group: TensorParallelGroup) -> None:
        super().__init__(group.tp_rank, group.tp_size, group.device)
        self.summand: torch.Tensor = torch.empty(0)
        self.work: Any = None

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """Zeros; the sum is added where it is waited for."""
        self.summand = x.contiguous()
        self.work = dist.all_reduce(self.summand, async_op=True)
        return torch.zeros_like(x)


class WaitingGroup(TensorParallelGroup):
    """The group of the later module, which waits for the sum that the earlier one has started."""

    def __init__(self, group: TensorParallelGroup, earlier: StartedGroup) -> None:
        super().__init__(group.tp_rank, group.tp_size, group.device)
        self._group, self._earlier = group, earlier

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """Both sums."""
        total = self._group.all_reduce(x)
        self._earlier.work.wait()
        return total + self._earlier.summand


class OverlappedSums:
    """In a `with`, sums that are made together are two, of which the first runs meanwhile."""

    def __init__(self, model: PreTrainedModel, group: TensorParallelGroup) -> None:
        """Pair each module that sums with the one before it."""
        self._kept: list[tuple[nn.Module, TensorParallelGroup, TensorParallelGroup]] = []
        earlier = None
        for module in model.modules():
            own = getattr(module, "group", None)
            if isinstance(own, EarlierGroup):
                earlier = StartedGroup(group)
                self._kept.append((module, own, earlier))
            elif isinstance(own, JointGroup) and earlier is not None:
                self._kept.append((module, own, WaitingGroup(group, earlier)))

    def __enter__(self) -> None:
        for module, _, overlapped in self._kept:
            set_group(module, overlapped)

    def __exit__(self, *_exception: object) -> None:
        for module, own, _overlapped in self._kept:
            set_group(module, own)


def run_rank(folder: Path, batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """The seconds a token of each round, by transport and way."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    group = connect("cpu")
    model = load(folder, group=group, check_inputs=False)
    shared = group.transport
    ways: Ways = {
        JOINT: nullcontext,
        SEPARATE: lambda: separate_sums(model.modules()),
        OVERLAPPED: lambda: OverlappedSums(model, group),
    }
    compare_ways(model, ways, batch)
    assert any(
        isinstance(find_group(m), JointGroup) for m in model.modules() if hasattr(m, "group")
    )
    seconds: dict[str, dict[str, list[float]]] = {GLOO: {}, SHARED: {}}
    for _ in range(rounds):
        for name, transport in ((GLOO, None), (SHARED, shared)):
            group.transport = transport
            for way, enter in ways.items():
                if transport is None or way != OVERLAPPED:
                    with enter():
                        seconds[name].setdefault(way, []).append(time_token(model, batch))
    group.transport = shared
    group.leave()
    return seconds


def compare_ways(model: PreTrainedModel, ways: Ways, batch: int) -> None:
    """Raise AssertionError unless all ways give the same logits, up to rounding."""
    logits = []
    for enter in ways.values():
        with enter(), torch.inference_mode():
            logits.append(model(make_prompt(batch)).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


def make_prompt(batch: int) -> torch.Tensor:
    """Token ids, `[batch, PROMPT_TOKENS]`."""
    return torch.arange(batch * PROMPT_TOKENS).reshape(batch, PROMPT_TOKENS)


def time_token(model: PreTrainedModel, batch: int) -> float:
    """The median time of a step of greedy decoding."""
    ids, cache, steps = make_prompt(batch), None, []
    with torch.inference_mode():
        for _ in range(STEPS):
            start = time.perf_counter()
            output = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            steps.append(time.perf_counter() - start)
    return statistics.median(steps[1:])


def measure(folder: Path, layers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make a model, run the ranks, and describe each way by its rounds' median, least and most."""
    torch.manual_seed(0)
    config: Any = PhiConfig(**SIZES, num_hidden_layers=layers, partial_rotary_factor=0.5)
    PhiForCausalLM(config).save_pretrained(folder / "source")
    shardkit.split(str(folder / "source"), str(folder / "shards"), options.tp)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.tp),
               "-m", "benchmarks.joint_sums", "--rank", str(folder), "--batch", str(options.batch),
               "--rounds", str(options.rounds)]  # fmt: skip
    subprocess.run(command, check=True)
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    rows = []
    for transport, ways in ranks[0].items():
        slowest = {
            way: [max(each) for each in zip(*(r[transport][way] for r in ranks), strict=True)]
            for way in ways
        }
        for way, times in slowest.items():
            median = statistics.median(times)
            rows.append({
                "transport": transport, "way": way, "median": median, "least": min(times),
                "most": max(times), "ratio": median / statistics.median(slowest[JOINT]),
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    for name, default in (("tp", 2), ("layers", 16), ("batch", 1), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rank:
        seconds = run_rank(options.rank / "shards", options.batch, options.rounds)
        (options.rank / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seconds))
        return
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        rows = measure(Path(scratch), options.layers, options)
    if options.json:
        print(json.dumps(rows))
        return
    print("| transport | sums a layer | ms a token (least to most) | ratio to one sum |")
    print("|---|---|---:|---:|")
    for row in rows:
        times = f"{row['median'] * 1e3:.1f} ({row['least'] * 1e3:.1f} to {row['most'] * 1e3:.1f})"
        print(f"| {row['transport']} | {row['way']} | {times} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
