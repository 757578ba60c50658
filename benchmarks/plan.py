"""Time of a plan at the real size of the checkpoints that are most served over several GPUs.

    python benchmarks/plan.py [--configs FOLDER] [--tp 8 --tp 16] [--rounds 3] [NAME ...]

Each checkpoint is made of its config alone: the names and shapes that transformers' class saves,
in bfloat16, as a file with a true header and a hole for the data.  A plan runs in a process of its
own, beside one that only imports torch, whose time shows how fast the machine is.  A config comes
from FOLDER/NAME/config.json if it is there, else from the class's defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from shardkit.checkpoint.header import encode_header
from shardkit.errors import MODEL_ERRORS
from shardkit.runtime.models.registry import find_model_class
from shardkit.tensor import TensorSpec

CONFIGS = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "published"
# A checkpoint, and the class that it is saved from.
CHECKPOINTS = {
    "deepseek-v4-flash": "DeepseekV4ForCausalLM",
    "deepseek-r1": "DeepseekV3ForCausalLM",
    "qwen3.5-397b-a17b-nvfp4": "Qwen3_5MoeForConditionalGeneration",
    "glm-5-fp8": "GlmMoeDsaForCausalLM",
    "kimi-k2.5": "Kimi_K25ForConditionalGeneration",
    "minimax-m3": "MiniMaxM3VLForConditionalGeneration",
    "qwen3.6-35b-a3b-nvfp4": "Qwen3_5MoeForConditionalGeneration",
    "qwen3.8": "Qwen3_5MoeForCausalLM",
    "gpt-oss-120b": "GptOssForCausalLM",
    "minimax-m2": "MiniMaxM2ForCausalLM",
    "llama-3.3-70b": "LlamaForCausalLM",
    "qwen3-235b-a22b-fp8": "Qwen3MoeForCausalLM",
    "glm-4.5": "Glm4MoeForCausalLM",
    "deepseek-v3.2": "DeepseekV32ForCausalLM",
    "nemotron-3-super-120b-a12b-nvfp4": "NemotronHForCausalLM",
    "qwen3-vl-30b-a3b": "Qwen3VLMoeForConditionalGeneration",
    "gemma-4-26b-a4b-nvfp4": "Gemma4ForConditionalGeneration",
    "gemma-3-27b": "Gemma3ForConditionalGeneration",
    "mistral-large-4": "MistralLarge4ForConditionalGeneration",
    "mimo-v2-flash": "MiMoV2FlashForCausalLM",
    "step-3.7-flash-fp8": "Step3p7ForConditionalGeneration",
    "hy3": "HYV3ForCausalLM",
    "llama-4-scout": "Llama4ForConditionalGeneration",
    "qwen2.5-72b": "Qwen2ForCausalLM",
    "qwen2.5-vl-72b": "Qwen2_5_VLForConditionalGeneration",
}


def make_config(name: str, model_class: Any, folder: Path) -> Any:
    """The published config without its quantization, or the class's defaults."""
    path = folder / name / "config.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for part in (table, *(value for value in table.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)
    return model_class.config_class.from_dict(table)


def list_specs(model: transformers.PreTrainedModel) -> list[TensorSpec]:
    """What a model saves, ties once, in bfloat16."""
    ties = model.all_tied_weights_keys or {}
    state = {name: t for name, t in model.state_dict().items() if name not in ties}
    saved: Mapping[str, torch.Tensor] = revert_weight_conversion(model, state)
    return [TensorSpec(name, "BF16", tuple(t.shape)) for name, t in saved.items()]


def write_checkpoint(name: str, configs: Path, folder: Path) -> int:
    """Write the checkpoint of a name, without data. Returns how many tensors it has."""
    model_class = find_model_class(CHECKPOINTS[name])
    if model_class is None:
        raise ValueError(f"transformers has no {CHECKPOINTS[name]}")
    config = make_config(name, model_class, configs)
    with torch.device("meta"):
        model = model_class(config)
    specs = list_specs(model)
    head = encode_header(specs, {"format": "pt"})
    path = folder / "model.safetensors"
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(spec.nbytes for spec in specs))
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    return len(specs)


def time_command(arguments: list[str], rounds: int) -> float:
    """The median seconds of a command in a process of its own. Raises CalledProcessError."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(name: str, configs: Path, tp_sizes: list[int], rounds: int) -> str:
    """A line of the table for one checkpoint."""
    plan = [sys.executable, "-m", "shardkit", "plan"]
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        try:
            tensors = write_checkpoint(name, configs, Path(scratch))
        except MODEL_ERRORS as error:
            return f"{name:34} {str(error).splitlines()[0][:90]}"
        cells = []
        for tp_size in tp_sizes:
            try:
                seconds = time_command([*plan, scratch, "--tp", str(tp_size)], rounds)
                cells.append(f"{seconds:6.2f} s")
            except subprocess.CalledProcessError as error:
                cells.append(error.stderr.strip().splitlines()[-1][:90])
    return f"{name:34} {tensors:7} {'  '.join(cells)}"


def main() -> None:
    """Measure the checkpoints asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--tp", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tp_sizes = options.tp or [8, 16]
    torch_seconds = time_command([sys.executable, "-c", "import torch"], options.rounds)
    print(f"{'import torch':34} {'':7} {torch_seconds:6.2f} s")
    for name in options.names or CHECKPOINTS:
        print(measure(name, options.configs, tp_sizes, options.rounds), flush=True)


if __name__ == "__main__":
    main()
