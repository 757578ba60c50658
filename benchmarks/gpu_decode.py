"""Decoding on one GPU, as a fraction of what its memory allows: `shardkit bench`, and a copy.

    python -m benchmarks.gpu_decode [--size 1b|8b] [BENCH OPTIONS]

Not yet run on a GPU.

A Llama of random bfloat16 weights is made, and run over one rank by shardkit and unsharded by
transformers' own generate, each as it is and with compiled decoding (CUDA graphs), in turns. For a
token of one sequence every weight but the table of embeddings is read once, so the memory allows
as many tokens a second as its bandwidth has times these bytes. The bandwidth is measured in the
same run: what is read and written a second as 1 GiB is copied. What is left of the command line
goes to `shardkit bench`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import SIZES, make_model, measure_copy, require_gpu


def list_bench_command(folder: Path, device: str, more: Sequence[str]) -> list[str]:
    """The command that measures the model of a folder."""
    command = [sys.executable, "-m", "shardkit", "bench", str(folder / "shards"), "--json"]
    command += ["--against", str(folder / "whole"), "--compile", "--device", device]
    return [*command, *more]


def list_fractions(
    report: Mapping[str, Any], weight_bytes: int, bandwidth: float
) -> list[dict[str, Any]]:
    """For each contender and batch, the tokens a second, and the fraction of what memory allows."""
    rows = []
    for contender in report["contenders"]:
        for run in contender["runs"]:
            seconds = run["token_seconds"]["median"]
            fraction = weight_bytes / seconds / bandwidth
            row = {"name": contender["name"], "batch": run["batch"]}
            rows.append(row | {"tokens_per_second": run["batch"] / seconds, "fraction": fraction})
    return rows


def measure(
    folder: Path, sizes: dict[str, Any], device: str, more: Sequence[str], copied: int = 1 << 30
) -> dict[str, Any]:
    """Make a model, run it in every way, and compare with a copy of `copied` bytes."""
    weight_bytes = make_model(folder, sizes, device)
    bandwidth = measure_copy(torch.device(device), copied)
    if device == "cuda":
        torch.cuda.empty_cache()
    command = list_bench_command(folder, device, more)
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {
        "weight_bytes": weight_bytes,
        "bandwidth": bandwidth,
        "rows": list_fractions(report, weight_bytes, bandwidth),
        "bench": report,
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    options, more = parser.parse_known_args()
    require_gpu()
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        report = measure(Path(scratch), SIZES[options.size], "cuda", more)
    print(f"{torch.cuda.get_device_name()}: copies {report['bandwidth'] / 1e9:.0f} GB/s;")
    print(f"a token reads {report['weight_bytes'] / 1e9:.2f} GB of weights\n")
    print("| | batch | tokens/s | of what memory allows |\n|-|-:|-:|-:|")
    for row in report["rows"]:
        print(f"| {row['name']} | {row['batch']} | {row['tokens_per_second']:.1f}"
              f" | {row['fraction']:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
