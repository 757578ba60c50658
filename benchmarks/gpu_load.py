"""Loading onto one GPU, as a fraction of how fast its link to the host copies.

    python -m benchmarks.gpu_load [--size 1b|8b] [--rounds 5]

Not yet run on a GPU.

A Llama of random bfloat16 weights is made and split for one rank. In every round a new process
loads it by shardkit, and another by `from_pretrained`, after all imports and once the GPU is in
use, from files in the page cache; each then copies as many bytes from page-locked memory to the
GPU, in pieces of 1 GiB or all at once. The fraction is the copy's time over the load's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.gpu import SIZES, make_model, measure_upload, require_gpu, synchronize
from benchmarks.split import warm
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.loader import load

OURS, THEIRS = "shardkit", "transformers"


def run_load(way: str, folder: Path, device: str) -> dict[str, float]:
    """Load the model of a folder; the seconds, its bytes, and bytes a second of a copy."""
    group = connect(device)
    torch.ones(1, device=group.device)
    synchronize(group.device)
    started = time.perf_counter()
    if way == OURS:
        model = load(folder / "shards", group=group)
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "whole", dtype="auto")
        model.to(group.device)
    synchronize(group.device)
    seconds = time.perf_counter() - started
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "seconds": seconds, "bytes": nbytes,
        "upload": measure_upload(group.device, min(nbytes, 1 << 30)),
    }  # fmt: skip


def list_load_command(way: str, folder: Path, device: str) -> list[str]:
    """The command of a process that loads."""
    command = [sys.executable, "-m", "benchmarks.gpu_load", "--way", way]
    return [*command, "--folder", str(folder), "--device", device]


def measure(folder: Path, sizes: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
    """The medians of each way to load, over rounds in turns."""
    make_model(folder, sizes, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for _ in range(rounds):
        for way, results in runs.items():
            for path in folder.rglob("*.safetensors"):
                warm(path)
            command = list_load_command(way, folder, device)
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    return {way: summarize_loads(results) for way, results in runs.items()}


def summarize_loads(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians: seconds, gigabytes a second, and the fraction of what the link copies."""
    fractions = [run["bytes"] / run["seconds"] / run["upload"] for run in runs]
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "gb_per_second": statistics.median(run["bytes"] / run["seconds"] for run in runs) / 1e9,
        "fraction": statistics.median(fractions),
        "worst": min(fractions),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_load(options.way, options.folder, options.device)))
        return
    require_gpu()
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        report = measure(Path(scratch), SIZES[options.size], "cuda", options.rounds)
    print("| | seconds | GB/s | of what the link copies |\n|-|-:|-:|-:|")
    for way, row in report.items():
        print(f"| {way} | {row['seconds']:.2f} | {row['gb_per_second']:.1f}"
              f" | {row['fraction']:.0%}, worst {row['worst']:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
