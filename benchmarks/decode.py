"""Decoding and prefill on the CPUs of one host: `shardkit bench` of a Llama of random weights.

    python -m benchmarks.decode [--dtype float32] [--tp 2] [BENCH OPTIONS]

A Llama of 184M parameters is made and split, and run unsharded on all cores as threads, over the
ranks by shardkit, and, with `--peer transformers`, by transformers' own tensor parallelism, which
needs accelerate. What is left of the command line goes to `shardkit bench`. With
`SHARDKIT_SHARED_MEMORY=0` in the environment ranks use gloo alone.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from shardkit import split

SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 48000,
    "max_position_embeddings": 2048, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def make_model(folder: Path, dtype: str, tp_size: int) -> None:
    """Save the model, and its split."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, dtype=dtype)
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "whole")
    split(folder / "whole", folder / "shards", tp_size)


def main() -> int:
    """Make the model and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tp", type=int, default=2)
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        folder = Path(scratch)
        make_model(folder, options.dtype, options.tp)
        command = [sys.executable, "-m", "shardkit", "bench", str(folder / "shards")]
        command += ["--against", str(folder / "whole"), *more]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
