"""Whether one rank over NCCL generates what one process without it does.

    python -m benchmarks.gpu_nccl

Not yet run on a GPU.

A small Llama of random weights is loaded by `runtime.load` in a process of its own, and in one that
torchrun starts (`--nproc-per-node 1`), whose process group is NCCL's. Both generate greedily, and
the second also sums, gathers and broadcasts a tensor by the group. The ids must be the same, and
each collective of one rank must return what it was given.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import make_model, require_gpu
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.loader import load

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def run_rank(folder: Path, device: str) -> dict[str, Any]:
    """What a process generates, its group's backend, and whether the group's results are right."""
    group = connect(device)
    model = load(folder, group=group)
    ids = torch.arange(8, device=group.device)[None]
    with torch.inference_mode():
        new = model.generate(ids, max_new_tokens=32, do_sample=False)[0].tolist()
    backend, right = "", True
    if dist.is_initialized():
        backend, x = dist.get_backend(), torch.arange(5.0, device=group.device)
        carrier = group.carrier
        results = [carrier.sum_ranks(x.clone()), carrier.copy_first(x.clone())]
        results.append(carrier.gather_ranks(x, [len(x)]))
        right = all(torch.equal(result, x) for result in results)
    return {"ids": new, "backend": backend, "right": right}


def list_rank_commands(folder: Path, device: str, out: Path) -> list[list[str]]:
    """The commands of the process without torchrun, and of that with it."""
    program = ["-m", "benchmarks.gpu_nccl", "--folder", str(folder), "--device", device]
    return [
        [sys.executable, *start, *program, "--out", str(out / name)]
        for name, start in (("alone", []), ("torchrun", TORCHRUN))
    ]


def compare(folder: Path, device: str) -> str:
    """Make a model and run it both ways; what differs, in words; "" if nothing does."""
    make_model(folder, SMALL, device)
    for command in list_rank_commands(folder / "shards", device, folder):
        subprocess.run(command, check=True)
    alone, started = (json.loads((folder / name).read_text()) for name in ("alone", "torchrun"))
    return describe_difference(alone, started, BACKENDS[device])


def describe_difference(alone: dict[str, Any], started: dict[str, Any], backend: str) -> str:
    """What is wrong with what `run_rank` returned without torchrun and with it; "" for nothing."""
    if started["backend"] != backend:
        return f"the process group is {started['backend'] or 'none'}, not {backend}"
    if not started["right"]:
        return "a collective of one rank changed its tensor"
    return "" if started["ids"] == alone["ids"] else "the ids differ"


def main() -> None:
    """Compare, and end with 1 if there is a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--folder", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        options.out.write_text(json.dumps(run_rank(options.folder, options.device)))
        return
    require_gpu()
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        difference = compare(Path(scratch), "cuda")
    if difference:
        sys.exit(f"Error: {difference}")
    print("the same ids over NCCL, by one rank, as without")


if __name__ == "__main__":
    main()
