"""Memory of a rank that runs a quantized model, and its speed, by when weights are computed.

    python -m benchmarks.quantized_memory [--gib 1.0] [--tp 1] [--steps 4] [--folder DIR] [--json]
                                          [NAME ...]

Each model is random, as large as asked for in its stored bytes, and split by `shardkit split`. Its
ranks are processes of their own.  Memory is resident memory (VmRSS, and its peak VmHWM) above that
of the same process before the load, when it has run a tiny model of the class, and so has imported
all that it will.  What counts is the peak, in a load, a prompt of 32 tokens and the steps after it,
less one layer's quantized weights in bfloat16, over the rank's part of the weights: with
dequantize="forward" at most 1.15.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan import list_specs, store_weight, unstack_experts
from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.header import encode_header
from shardkit.dtypes import DTYPES
from shardkit.planning import Plan, plan_for, summarize_plan
from shardkit.recipe.formats import find_schemes
from shardkit.runtime.engine.engine import Engine
from shardkit.runtime.engine.messages import forward_request, generate_request, load_request
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.runtime.load_options import LoadOptions
from shardkit.runtime.models.registry import find_model_class
from shardkit.runtime.packing import Dequantize
from shardkit.tensor import TensorSpec

ALLOWED = 1.15
PROMPT_TOKENS = 32
MIB = 1 << 20
SCALE, BIAS = 0.01, 120  # of numbers, and of powers of two in a byte
FINITE = bytes(value & 0xBF for value in range(256))  # no byte of a NaN or an infinite number
CHUNK = 1 << 20
MODES: tuple[Dequantize, ...] = ("forward", "load")
LLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
EXPERTS = {
    "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 768,
    "num_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
}  # fmt: skip
TINY = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_experts": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}},
}  # fmt: skip
# A class of transformers, its config, and what config.json says of quantization.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, FP8 in blocks": ("LlamaForCausalLM", LLAMA, FP8),
    "llama, 4-bit integers": ("LlamaForCausalLM", LLAMA, INT4),
    "32 experts, FP8 in blocks": ("Qwen3MoeForCausalLM", EXPERTS, FP8),
}


@dataclass(frozen=True)
class Run:
    """What the rank that used most memory used, above its imports, in bytes; and the speed.

    Attributes:
        mode: When weights were computed.
        shard: The weights in its file that it loads.
        layer: The largest layer's quantized weights, in bfloat16.
        load_peak: The most while it loaded.
        loaded: Once it had loaded.
        peak: The most while it loaded and ran.
        prompt_seconds: A forward pass over the prompt.
        step_seconds: A generated token after it.
    """

    mode: Dequantize
    shard: int
    layer: int
    load_peak: int
    loaded: int
    peak: int
    prompt_seconds: float
    step_seconds: float

    @property
    def ratio(self) -> float:
        """The peak less one layer, over the shard."""
        return (self.peak - self.layer) / self.shard


def count_layers(name: str, gib: float) -> int:
    """How many layers make a checkpoint of about `gib` GiB."""
    class_name, config, statement = MODELS[name]
    one, two = (
        sum(s.nbytes for s in list_stored(class_name, config, statement, n)) for n in (1, 2)
    )
    return max(2, round((gib * 2**30 - one) / (two - one)) + 1)


def make_shards(
    name: str, changes: dict[str, int], layers: int, tp_size: int, folder: Path
) -> tuple[Path, Plan]:
    """Write a random quantized checkpoint, and split it."""
    class_name, config, statement = MODELS[name]
    config = {key: changes.get(key, value) for key, value in config.items()}
    make_source(class_name, config, statement, layers, folder / "source")
    split = [sys.executable, "-m", "shardkit", "split", str(folder / "source")]
    command = [*split, str(folder / "shards"), "--tp", str(tp_size), "--json"]
    subprocess.run(command, check=True, capture_output=True)
    with Checkpoint(folder / "source") as checkpoint:
        _, plan = plan_for(checkpoint, tp_size)
    (folder / "source" / "model.safetensors").unlink()
    return folder / "shards", plan


def make_source(
    class_name: str, config: dict[str, Any], statement: dict[str, Any], layers: int, folder: Path
) -> None:
    """Write a random quantized checkpoint."""
    specs = list_stored(class_name, config, statement, layers)
    folder.mkdir(parents=True)
    table = make_config(class_name, config, layers).to_dict()
    table |= {"architectures": [class_name], "quantization_config": statement}
    table["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(table))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(specs, {"format": "pt"}))
        for spec in specs:
            write_tensor(spec, file)


def make_config(class_name: str, config: dict[str, Any], layers: int) -> Any:
    model_class: Any = find_model_class(class_name)
    return model_class.config_class(**config, num_hidden_layers=layers, tie_word_embeddings=False)


def list_stored(
    class_name: str, config: dict[str, Any], statement: dict[str, Any], layers: int
) -> list[TensorSpec]:
    """The tensors of the quantized checkpoint of a model."""
    model_class: Any = find_model_class(class_name)
    with torch.device("meta"):
        model = model_class(make_config(class_name, config, layers))
    scheme = find_schemes({"quantization_config": statement})[-1]
    whole = [each for spec in list_specs(model) for each in unstack_experts(spec, scheme)]
    return [stored for spec in whole for stored in store_weight(spec, scheme)]


def write_tensor(spec: TensorSpec, file: Any) -> None:
    """Random codes and weights; scales all alike."""
    if "scale" in spec.name:
        dtype = getattr(torch, DTYPES[spec.dtype].torch_name)
        value = torch.full(spec.shape, SCALE if dtype.is_floating_point else BIAS, dtype=dtype)
        file.write(value.view(torch.uint8).numpy().tobytes())
        return
    for start in range(0, spec.nbytes, CHUNK):
        file.write(os.urandom(min(CHUNK, spec.nbytes - start)).translate(FINITE))


def count_layer_bytes(plan: Plan) -> int:
    """The quantized weights of the largest layer on the largest rank, in bfloat16."""
    names = {weight.name for weight in plan.grouping.weights.values()}
    layers: dict[tuple[int, str], int] = {}
    for placement in plan.weights:
        if placement.spec.name in names:
            layer = ".".join(placement.spec.name.split(".")[:3])
            for rank in plan.mesh.ranks():
                spec = placement.shard_spec(rank)
                key = (rank.index, layer)
                layers[key] = layers.get(key, 0) + (spec.nbytes if spec else 0)
    return max(layers.values())


def read_memory(pids: list[int], field: str) -> list[int]:
    """A field of each process's status, in bytes."""
    values = []
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(field))
        values.append(int(line.split()[1]) * 1024)
    return values


def run_model(shards: Path, tiny: Path, plan: Plan, mode: Dequantize, steps: int) -> Run:
    """Load and run a shard folder in ranks of its own."""
    ranks, options = RankProcesses(plan.mesh.tp_size, "cpu"), LoadOptions(dequantize=mode)
    ids = torch.arange(1, PROMPT_TOKENS + 1)[None]
    ranks.request(load_request(tiny, options))
    ranks.request(forward_request({"input_ids": ids}))
    ranks.request(generate_request({"input_ids": ids}, {"max_new_tokens": 2, "do_sample": False}))
    baseline = read_memory(ranks.pids, "VmRSS")
    for pid in ranks.pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew

    def above(field: str) -> int:
        return max(a - b for a, b in zip(read_memory(ranks.pids, field), baseline, strict=True))

    with Engine(shards, lambda: ranks, load_request(shards, options)) as engine:
        load_peak, loaded = above("VmHWM"), above("VmRSS")
        started = time.perf_counter()
        engine.forward(input_ids=ids)
        prompt_seconds = time.perf_counter() - started
        generation = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "do_sample": False}
        times = [time.perf_counter() for _ in engine.stream(ids, **generation)]
        shard = max(summarize_plan(plan).loaded_bytes)
        return Run(
            mode, shard, count_layer_bytes(plan), load_peak, loaded, above("VmHWM"),
            prompt_seconds, statistics.median(b - a for a, b in itertools.pairwise(times)),
        )  # fmt: skip


def measure(name: str, folder: Path, gib: float, tp_size: int, steps: int) -> list[Run]:
    """One model, both ways."""
    tiny, _ = make_shards(name, TINY, 1, tp_size, folder / "tiny")
    shards, plan = make_shards(name, {}, count_layers(name, gib), tp_size, folder / "whole")
    return [run_model(shards, tiny, plan, mode, steps) for mode in MODES]


def show(name: str, run: Run) -> str:
    """A row of the table."""
    times = [run.load_peak / run.shard, run.loaded / run.shard, run.peak / run.shard, run.ratio]
    cells = " | ".join(f"{value:5.2f}" for value in times)
    tokens = f"{PROMPT_TOKENS / run.prompt_seconds:7.1f} | {1 / run.step_seconds:7.2f}"
    sizes = f"{run.shard / MIB:6.0f} | {run.layer / MIB:5.0f}"
    return f"| {name:25} | {run.mode:7} | {sizes} | {cells} | {tokens} |"


def main() -> None:
    """Measure the models asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="Work below this folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs: dict[str, list[Run]] = {}
    if not options.json:
        print("| model | weights computed in | shard, MiB | layer, MiB | peak of load / shard |"
              " loaded / shard | peak / shard | (peak - layer) / shard | prompt, tokens/s |"
              " steps, tokens/s |")  # fmt: skip
        print(f"|---|---|{'---:|' * 8}")
    for name in options.names or MODELS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-") as folder:
            runs[name] = measure(name, Path(folder), options.gib, options.tp, options.steps)
        for run in runs[name] if not options.json else ():
            print(show(name, run), flush=True)
    worst = max(run.ratio for each in runs.values() for run in each if run.mode == MODES[0])
    if options.json:
        rows = {name: [asdict(run) for run in each] for name, each in runs.items()}
        print(json.dumps({"runs": rows, "worst": worst, "allowed": ALLOWED}, indent=2))
    else:
        print(f"\nworst, computed in the forward: {worst:.2f}; {ALLOWED} is allowed")
    raise SystemExit(worst > ALLOWED)


if __name__ == "__main__":
    main()
