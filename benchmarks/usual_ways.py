"""How a Llama is commonly cut with the safetensors library, for comparison: not part of shardkit.

    python benchmarks/usual_ways.py get_slice|load_file SOURCE OUT --tp N

Even divisions only, no digests, no manifest; synced to disk like the others.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROWS = ("o_proj", "down_proj")
WHOLE = ("norm",)
Save = Callable[[int, dict[str, torch.Tensor]], None]


def part(name: str, tensor: Any, rank: int, size: int) -> torch.Tensor:
    """A rank's part of a tensor, or of a slice that reads it."""
    shape = tensor.get_shape() if hasattr(tensor, "get_shape") else list(tensor.shape)
    if any(word in name for word in WHOLE):
        whole: torch.Tensor = tensor[:]
        return whole.clone()
    dim = 1 if any(word in name for word in ROWS) else 0
    step = shape[dim] // size
    own = slice(rank * step, (rank + 1) * step)
    rows: torch.Tensor = tensor[:, own] if dim else tensor[own]
    return rows.contiguous()


def by_get_slice(file: Path, save: Save, size: int) -> None:
    for rank in range(size):
        with safe_open(file, "pt") as opened:
            save(rank, {n: part(n, opened.get_slice(n), rank, size) for n in opened.keys()})  # noqa: SIM118


def by_load_file(file: Path, save: Save, size: int) -> None:
    tensors = load_file(file)
    for rank in range(size):
        save(rank, {n: part(n, t, rank, size).clone() for n, t in tensors.items()})


def main() -> None:
    way, source, out, _, size = sys.argv[1:]
    Path(out).mkdir()

    def save(rank: int, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, Path(out) / f"rank-{rank}.safetensors", {"format": "pt"})

    {"get_slice": by_get_slice, "load_file": by_load_file}[way](
        Path(source) / "model.safetensors", save, int(size)
    )
    subprocess.run(["sync", "-f", out], check=True)


if __name__ == "__main__":
    main()
