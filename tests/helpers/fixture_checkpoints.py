"""Checkpoint folders of real models' names, shapes and files, sparse: no weights, and no disk."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from shardkit.checkpoint.header import encode_header
from shardkit.tensor import TensorSpec
from tests.helpers.synthetic_checkpoints import FINITE

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MASK = 2048  # positions of GPT-NeoX's stored causal mask


def sparse_checkpoint(fixture: Path, folder: Path) -> Path:
    """Build `fixture` in `folder`: true headers, and files of the true size without content."""
    folder.mkdir(parents=True)
    config = json.loads((fixture / "config.json").read_text())
    index = json.loads(next(fixture.glob("*.index.json")).read_text())
    shapes = json.loads((fixture / "runtime_shapes.json").read_text())["runtime_shapes"]
    dtype = DTYPES[config.get("torch_dtype", "bfloat16")]
    weight_map = {
        name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        for name, file in index["weight_map"].items()
    }
    by_file: dict[str, list[TensorSpec]] = {}
    for name, file in weight_map.items():
        by_file.setdefault(file, []).append(disk_spec(name, dtype, shapes))
    for file, specs in by_file.items():
        sparse_file(folder / file, specs)
    metadata = index.get("metadata", {})
    table = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sparse_file(path: Path, specs: Iterable[TensorSpec]) -> None:
    """A safetensors file with a true header and a hole where the data would be."""
    held = list(specs)
    head = encode_header(held, {"format": "pt"})
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(spec.nbytes for spec in held))


def disk_spec(name: str, dtype: str, shapes: dict[str, list[int]]) -> TensorSpec:
    """A tensor as it is on disk, from the shapes transformers has in memory."""
    if name.endswith(".attention.bias"):
        return TensorSpec(name, "BOOL", (1, 1, MASK, MASK))
    if name.endswith(".masked_bias"):
        return TensorSpec(name, dtype, ())
    if name.endswith(".rotary_emb.inv_freq"):
        return TensorSpec(name, dtype, (64,))
    if ".experts." in name:
        layer = "model.layers.#.mlp.experts"
        _, double, _ = shapes[f"{layer}.gate_up_proj"]
        _, hidden, ffn = shapes[f"{layer}.down_proj"]
        assert double == 2 * ffn
        shape = (hidden, ffn) if name.endswith(".w2.weight") else (ffn, hidden)
        return TensorSpec(name, dtype, shape)
    memory = re.sub(r"\d+", "#", name)
    memory = memory.replace("block_sparse_moe.gate", "mlp.gate").replace("embed_out", "lm_head")
    found = shapes.get(memory) or shapes["transformer." + memory]
    return TensorSpec(name, dtype, tuple(found))


SMALL_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": 63,
}
SMALL_LAYER = {
    "input_layernorm": (16,),
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "post_attention_layernorm": (16,),
    "mlp.gate_proj": (32, 16),
    "mlp.up_proj": (32, 16),
    "mlp.down_proj": (16, 32),
}


def small_specs() -> list[TensorSpec]:
    """The tensors of a Llama of two layers: 4 heads on 2 kv heads, and an odd vocabulary."""
    shapes = {"model.embed_tokens": (63, 16), "model.norm": (16,), "lm_head": (63, 16)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in SMALL_LAYER.items()}
    return [TensorSpec(f"{name}.weight", "F32", shape) for name, shape in shapes.items()]


def small_checkpoint(
    folder: Path, config: Mapping[str, object] | None = None, extra: Iterable[TensorSpec] = ()
) -> Path:
    """A checkpoint folder of random values in two files; `config` and `extra` tensors are added."""
    folder.mkdir(parents=True)
    specs = [*small_specs(), *extra]
    files = {
        "model-00001-of-00002.safetensors": specs[:9],
        "model-00002-of-00002.safetensors": specs[9:],
    }
    for name, held in files.items():
        data = os.urandom(sum(spec.nbytes for spec in held)).translate(FINITE)
        (folder / name).write_bytes(encode_header(held, {"format": "pt"}) + data)
    weight_map = {spec.name: name for name, held in files.items() for spec in held}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**SMALL_CONFIG, **(config or {})}))
    return folder
