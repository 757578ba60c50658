"""The test table: a tiny random model of every family variant, biases and norms made to matter.

A new family adds one line to `VARIANTS`.  transformers is imported when a model is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 8,
    "vocab_size": 211, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": None}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": 211, "n_positions": 64,
       "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 112, "decoder_ffn_dim": 96,
    "vocab_size": 211, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "d_model": 64, "d_kv": 8, "d_ff": 112, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 8,
    "vocab_size": 211, "decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A model class of transformers and its config's fields."""

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = {
    "llama": Variant("LlamaForCausalLM", DECODER),
    "llama-biases-tied": Variant(
        "LlamaForCausalLM",
        {**DECODER, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-two-kv-heads": Variant("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 2}),
    "llama-14-heads-2-kv": Variant(
        "LlamaForCausalLM",
        {**DECODER, "hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 109},
    ),
    "llama-9-heads-3-kv": Variant(
        "LlamaForCausalLM",
        {**DECODER, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "mistral": Variant("MistralForCausalLM", {**DECODER, "sliding_window": 8}),
    "qwen2": Variant("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": Variant("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}),
    "gpt2": Variant("GPT2LMHeadModel", GPT),
    "gpt_neox": Variant(
        "GPTNeoXForCausalLM", {**TEXT, "bos_token_id": 1, "eos_token_id": None}
    ),
    "phi3": Variant("Phi3ForCausalLM", DECODER),
    "mixtral": Variant(
        "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "bert": Variant("BertForMaskedLM", TEXT),
    "bert-base": Variant("BertModel", TEXT),
    "t5": Variant("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}),
    "t5-gated": Variant(
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": Variant("BartForConditionalGeneration", BART),
    "bloom": Variant(
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": 211, "bos_token_id": 1,
         "eos_token_id": None},
    ),
    "falcon-grouped": Variant(
        "FalconForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 4,
         "vocab_size": 211, "new_decoder_architecture": True, "bias": False, "alibi": False,
         "bos_token_id": 1, "eos_token_id": None},
    ),
}  # fmt: skip


def make(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Save a variant's model as transformers does, its weights from a seed.  Returns `folder`."""
    import torch
    import transformers

    variant = VARIANTS[name]
    cls = getattr(transformers, variant.model)
    torch.manual_seed(0)
    model = cls(cls.config_class(**variant.config))
    shake(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def shake(model: Any) -> None:
    """Move every parameter, so that biases, norms and masks that start at 0 or 1 matter."""
    import torch

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            size = 0.08 if parameter.ndim > 1 else 0.2
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
