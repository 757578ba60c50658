"""Decoding and prefill on the CPUs of one host: shardkit over 2 ranks, and the usual ways.

    python -m benchmarks.decode [--dtype float32] [--batch 1] [--tokens 32] [--rounds 5]

A Llama of 184M random parameters is run unsharded on all cores as threads, over 2 ranks by shardkit
with memory that ranks share and with gloo, and by transformers' own tensor parallelism
(`tp_plan="auto"`, which needs accelerate). Rounds are interleaved, each in processes of its own;
figures are medians over the rounds, with the least and the most: milliseconds for a token, and for
prompts of 64 and 512 tokens. The last column is the ratio to the first way.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from shardkit import runtime, split

RANKS = 2
PROMPTS = (64, 512)
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 48000,
    "max_position_embeddings": 2048, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
WAYS = {
    "unsharded, all cores": (1, "unsharded", {}),
    "shardkit tp 2": (RANKS, "shardkit", {}),
    "shardkit tp 2, gloo": (RANKS, "shardkit", {"SHARDKIT_SHARED_MEMORY": "0"}),
    "transformers tp 2": (RANKS, "transformers", {}),
}


def make_model(folder: Path, dtype: str) -> None:
    """Save the model, and its split."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, dtype=dtype)
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "whole")
    split(folder / "whole", folder / "shards", RANKS)


def load_model(folder: Path, way: str, dtype: str) -> Any:
    """The model in one way, in this process."""
    kind = getattr(torch, dtype)
    if way == "shardkit":
        return runtime.load(folder / "shards", device="cpu")
    options = {"tp_plan": "auto"} if way == "transformers" else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "whole", dtype=kind, **options
    ).eval()


def measure_model(model: Any, batch: int, tokens: int) -> dict[str, float]:
    """Seconds for a token, the first left out, and for the prompts."""
    seconds = {}
    with torch.inference_mode():
        for length in PROMPTS:
            ids = torch.arange(batch * length).view(batch, length) % 1000 + 5
            model(ids, use_cache=True)
            start = time.perf_counter()
            model(ids, use_cache=True)
            seconds[f"prompt of {length}"] = time.perf_counter() - start
        ids = torch.arange(batch * 16).view(batch, 16) % 1000 + 5
        ends = []
        for count in (1, 1 + tokens, 1, 1 + tokens):
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            ends.append(time.perf_counter() - start)
        seconds["token"] = (ends[3] - ends[2]) / tokens
    return seconds


def run_rank(folder: Path, way: str, dtype: str, batch: int, tokens: int) -> None:
    """What each process of a way does; the first prints its seconds as JSON."""
    transformers.utils.logging.set_verbosity_error()
    model = load_model(folder, way, dtype)
    measured = measure_model(model, batch, tokens)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(measured), flush=True)


def run_way(folder: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    """One round of one way, in processes of its own. Raises SystemExit if it fails."""
    ranks, way, extra = WAYS[name]
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, **extra, "OMP_NUM_THREADS": str(max(1, cores // ranks))}
    program = ["-m", "benchmarks.decode", "--rank", way, "--folder", str(folder)]
    program += ["--dtype", options.dtype, "--batch", str(options.batch)]
    program += ["--tokens", str(options.tokens)]
    if ranks > 1:
        port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *port]
        program = [*launch, *program]
    done = subprocess.run(
        [sys.executable, *program], env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        raise SystemExit(f"{name}: {errors[0] if errors else done.stderr}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    measured: dict[str, float] = json.loads(lines[-1])
    return measured


def show_table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Medians in milliseconds with least and most, and ratios to the first way."""
    first = next(iter(rounds))
    for what in ("token", *(f"prompt of {length}" for length in PROMPTS)):
        base = statistics.median(each[what] for each in rounds[first])
        for name, measured in rounds.items():
            values = [1000 * each[what] for each in measured]
            middle = statistics.median(values)
            spread = f"({min(values):.1f} to {max(values):.1f})"
            print(f"{what:14} {name:22} {middle:8.1f} ms {spread:20} {middle / 1000 / base:5.2f}")


def main() -> None:
    """Measure every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.folder, options.rank, options.dtype, options.batch, options.tokens)
        return
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        make_model(Path(scratch), options.dtype)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            for name in WAYS:
                rounds[name].append(run_way(Path(scratch), name, options))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.dtype},")
    print(f"batch {options.batch}, {len(os.sched_getaffinity(0))} cores, medians of rounds:")
    show_table(rounds)


if __name__ == "__main__":
    main()
