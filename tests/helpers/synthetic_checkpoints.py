"""Checkpoints without a model: the tensor names and shapes of each family, and random bytes.

No torch and no transformers, so a source of any dtype, file layout or odd size costs a millisecond.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.checkpoint.header import encode_header
from shardkit.tensor import TensorSpec

Shapes = dict[str, tuple[int, ...]]
INDEX = "model.safetensors.index.json"


def llama(heads: int = 8, kv: int = 4, head: int = 4, ffn: int = 24, vocab: int = 40) -> Shapes:
    """One layer of Llama, with Qwen's biases and norms."""
    hidden, layer = heads * head, "model.layers.0."
    return {
        "model.embed_tokens.weight": (vocab, hidden),
        layer + "input_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (heads * head, hidden),
        layer + "self_attn.q_proj.bias": (heads * head,),
        layer + "self_attn.k_proj.weight": (kv * head, hidden),
        layer + "self_attn.v_proj.weight": (kv * head, hidden),
        layer + "self_attn.v_proj.bias": (kv * head,),
        layer + "self_attn.o_proj.weight": (hidden, heads * head),
        layer + "self_attn.o_proj.bias": (hidden,),
        layer + "self_attn.q_norm.weight": (head,),
        layer + "mlp.gate_proj.weight": (ffn, hidden),
        layer + "mlp.up_proj.weight": (ffn, hidden),
        layer + "mlp.down_proj.weight": (hidden, ffn),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }


def llama_config(heads: int = 8, kv: int = 4, ffn: int = 24) -> dict[str, Any]:
    """The config of `llama`."""
    return {
        "model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": ffn,
    }  # fmt: skip


def mixtral() -> Shapes:
    """Two experts under their names on disk."""
    moe = "model.layers.0.block_sparse_moe."
    shapes = {n: s for n, s in llama().items() if "mlp" not in n and "q_norm" not in n}
    shapes = {n: s for n, s in shapes.items() if not n.endswith("bias")}
    shapes[moe + "gate.weight"] = (2, 32)
    for expert in range(2):
        for name, shape in {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}.items():
            shapes[f"{moe}experts.{expert}.{name}.weight"] = shape
    return shapes


PHI3 = {
    "model.embed_tokens.weight": (40, 32),
    "model.layers.0.self_attn.qkv_proj.weight": (8 * 4 + 2 * 2 * 4, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_up_proj.weight": (48, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 24),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.norm.weight": (32,),
    "lm_head.weight": (40, 32),
}
GPT2 = {  # as the original: without the prefix, and with its mask
    "wte.weight": (37, 12),
    "wpe.weight": (10, 12),
    "h.0.ln_1.weight": (12,),
    "h.0.attn.bias": (1, 1, 10, 10),
    "h.0.attn.c_attn.weight": (12, 36),
    "h.0.attn.c_attn.bias": (36,),
    "h.0.attn.c_proj.weight": (12, 12),
    "h.0.attn.c_proj.bias": (12,),
    "h.0.mlp.c_fc.weight": (12, 50),
    "h.0.mlp.c_fc.bias": (50,),
    "h.0.mlp.c_proj.weight": (50, 12),
    "ln_f.weight": (12,),
}
GPT_NEOX = {
    "gpt_neox.embed_in.weight": (40, 32),
    "gpt_neox.layers.0.attention.query_key_value.weight": (96, 32),
    "gpt_neox.layers.0.attention.query_key_value.bias": (96,),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
    "gpt_neox.layers.0.attention.dense.weight": (32, 32),
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (64, 32),
    "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (32, 64),
    "gpt_neox.final_layer_norm.weight": (32,),
    "embed_out.weight": (40, 32),
}
BLOOM = {
    "word_embeddings.weight": (40, 32),
    "h.0.self_attention.query_key_value.weight": (96, 32),
    "h.0.self_attention.query_key_value.bias": (96,),
    "h.0.self_attention.dense.weight": (32, 32),
    "h.0.mlp.dense_h_to_4h.weight": (128, 32),
    "h.0.mlp.dense_4h_to_h.weight": (32, 128),
    "ln_f.weight": (32,),
}
FALCON = {  # 2 groups of 3 query heads and a k and a v of width 4
    "transformer.word_embeddings.weight": (40, 24),
    "transformer.h.0.self_attention.query_key_value.weight": (2 * 5 * 4, 24),
    "transformer.h.0.self_attention.dense.weight": (24, 24),
    "transformer.h.0.mlp.dense_h_to_4h.weight": (96, 24),
    "transformer.h.0.mlp.dense_4h_to_h.weight": (24, 96),
    "transformer.h.0.ln_attn.weight": (24,),
}
T5 = {
    "shared.weight": (33, 32),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (32, 32),
    "encoder.block.0.layer.0.SelfAttention.o.weight": (32, 32),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (6, 8),
    "encoder.block.0.layer.0.layer_norm.weight": (32,),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (24, 32),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (32, 24),
}
BERT = {
    "bert.embeddings.word_embeddings.weight": (40, 32),
    "bert.embeddings.position_ids": (1, 16),
    "bert.encoder.layer.0.attention.self.query.weight": (32, 32),
    "bert.encoder.layer.0.attention.self.query.bias": (32,),
    "bert.encoder.layer.0.attention.output.dense.weight": (32, 32),
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": (32,),
    "bert.encoder.layer.0.intermediate.dense.weight": (24, 32),
    "bert.encoder.layer.0.output.dense.weight": (32, 24),
    "cls.predictions.bias": (40,),
}
BART = {
    "model.shared.weight": (40, 32),
    "model.encoder.layers.0.self_attn.k_proj.weight": (32, 32),
    "model.decoder.layers.0.encoder_attn.k_proj.weight": (32, 32),
    "model.decoder.layers.0.encoder_attn.out_proj.weight": (32, 32),
    "model.decoder.layers.0.encoder_attn.out_proj.bias": (32,),
    "model.encoder.layers.0.fc1.weight": (24, 32),
    "model.encoder.layers.0.fc1.bias": (24,),
    "model.encoder.layers.0.fc2.weight": (32, 24),
    "final_logits_bias": (1, 40),
}
FAMILIES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "llama": (llama_config(), llama()),
    "mixtral": ({**llama_config(), "model_type": "mixtral"}, mixtral()),
    "phi3": ({**llama_config(kv=2), "model_type": "phi3"}, PHI3),
    "gpt2": ({"model_type": "gpt2", "n_head": 3}, GPT2),
    "gpt_neox": (
        {"model_type": "gpt_neox", "num_attention_heads": 8, "intermediate_size": 64},
        GPT_NEOX,
    ),
    "bloom": ({"model_type": "bloom", "n_head": 8}, BLOOM),
    "falcon": (
        {
            "model_type": "falcon",
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        FALCON,
    ),
    "t5": ({"model_type": "t5", "num_heads": 8, "d_ff": 24}, T5),
    "bert": ({"model_type": "bert", "num_attention_heads": 8, "intermediate_size": 24}, BERT),
    "bart": (
        {
            "architectures": ["BartForConditionalGeneration"],
            "model_type": "bart",
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 4,
        },
        BART,
    ),
}


def specs_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> list[TensorSpec]:
    """Every tensor in one dtype."""
    return [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]


# Without NaN and infinity in any dtype, whichever byte of a value it is.
FINITE = bytes((value & 0xBF) + (value & 0xBF == 0x80) for value in range(256))


def tensor_bytes(spec: TensorSpec) -> bytes:
    """Bytes that are the tensor's own: the same in every run, and unlike any other tensor's."""
    return random.Random(spec.name).randbytes(spec.nbytes).translate(FINITE)


def file_of(specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of these tensors, in this order."""
    meta = {"format": "pt"} if metadata is None else metadata
    return encode_header(specs, meta) + b"".join(map(tensor_bytes, specs))


def write_source(
    folder: Path,
    config: Mapping[str, Any],
    specs: Iterable[TensorSpec],
    file_for: Callable[[int], str] | None = None,
    total_size: object = None,
) -> Path:
    """A checkpoint folder.  With `file_for`, tensor number n is in the file that it names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = list(specs)
    if file_for is None:
        (folder / "model.safetensors").write_bytes(file_of(specs))
        return folder
    weight_map = {spec.name: file_for(at) for at, spec in enumerate(specs)}
    for name in set(weight_map.values()):
        held = [spec for spec in specs if weight_map[spec.name] == name]
        (folder / name).write_bytes(file_of(held))
    total = sum(spec.nbytes for spec in specs) if total_size is None else total_size
    table = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return folder


def llama_source(folder: Path, **sizes: int) -> Path:
    """The folder of a Llama of one layer."""
    config = {k: v for k, v in sizes.items() if k in ("heads", "kv", "ffn")}
    return write_source(folder, llama_config(**config), specs_of(llama(**sizes)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def selected(data: bytes, outer: int, row: int, cuts: Iterable[tuple[int, int]]) -> bytes:
    """The byte ranges `cuts` of each of `outer` rows of `row` bytes."""
    ranges = list(cuts)
    return b"".join(data[o * row + a : o * row + b] for o in range(outer) for a, b in ranges)
