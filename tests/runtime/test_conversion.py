"""Names on disk and in the model: what is left out, and what is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardkit.runtime.conversion import find_conversions

EXTRA = "model.layers.1.self_attn.q_proj.weight"  # the model has one layer


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def shapes_of(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    """The model's own tensors, and one more."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()} | {EXTRA: (16, 16)}


def test_a_tensor_that_the_model_has_no_place_for_is_left_out(model: LlamaForCausalLM) -> None:
    targets = {conversion.target for conversion in find_conversions(model, shapes_of(model))}
    assert targets == set(model.state_dict())
