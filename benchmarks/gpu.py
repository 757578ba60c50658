"""What the benchmarks of one GPU share: that there is one, a model for it, and how fast it copies.

None of them has been run on a GPU yet.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from shardkit import split

SIZES: dict[str, dict[str, Any]] = {  # of Llama 3.2 1B, untied, and of Llama 3.1 8B
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
COMMON = {"max_position_embeddings": 4096, "eos_token_id": None, "tie_word_embeddings": False}


def require_gpu() -> None:
    """End the program with one line unless torch sees a GPU."""
    if not torch.cuda.is_available():
        sys.exit("Error: torch sees no CUDA device; this benchmark is of a GPU")


def make_model(folder: Path, sizes: dict[str, Any], device: str) -> int:
    """Save a bfloat16 Llama of random weights, and its split for one rank.

    Returns:
        The bytes of weights that a token reads: all but the table of embeddings.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON, **sizes, dtype="bfloat16")
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "whole")
    split(folder / "whole", folder / "shards", 1)
    sizes_by_name: dict[str, int] = {name: p.nbytes for name, p in model.named_parameters()}
    return sum(sizes_by_name.values()) - sizes_by_name["model.embed_tokens.weight"]


def time_median(act: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median seconds until a device has done an action, after a first time unmeasured."""
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        act()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_copy(device: torch.device, nbytes: int = 1 << 30, rounds: int = 9) -> float:
    """The bytes a second that a device reads and writes as it copies its own memory."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / time_median(lambda: target.copy_(source), device, rounds)


def measure_upload(device: torch.device, nbytes: int = 1 << 30, rounds: int = 9) -> float:
    """The bytes a second that reach a device from page-locked memory of the host."""
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / time_median(lambda: target.copy_(source, non_blocking=True), device, rounds)
