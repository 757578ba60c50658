"""Names on disk and in the model: what is left out, and what is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shardkit.runtime.conversion import find_conversions
from shardkit.runtime.materialize import fill_parameters
from tests.helpers.model_samples import VARIANTS

QKV = "vision_tower.encoder.blocks.0.wqkv.weight"  # q and k in the order of another rotation
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


def test_of_a_tensor_under_two_names_the_first_is_loaded(model: LlamaForCausalLM) -> None:
    shapes = {"norm.weight": (16,), "model.norm.weight": (16,)}  # a base model's, and a whole one's
    (conversion,) = find_conversions(model, shapes)
    assert conversion.sources == (("model.norm.weight", "model.norm.weight"),)


@pytest.fixture(scope="module")
def seeing_model() -> PreTrainedModel:
    sample = VARIANTS["kimi_k25"]
    model: PreTrainedModel = sample.model_class(sample.model_class.config_class(**sample.config))
    return model


def test_a_rank_s_heads_are_reordered_as_the_whole_model_s_are(
    seeing_model: PreTrainedModel,
) -> None:
    heads = torch.randn(3, 4, 8, 32)  # q, k and v of 4 heads of 8
    whole, part = heads.flatten(0, 2), heads[:, 1:3].flatten(0, 2)
    (conversion,) = find_conversions(seeing_model, {QKV: (96, 32)})
    expected = conversion.run({QKV: whole}, seeing_model)
    assert len(expected) == 3
    for name, tensor in conversion.run({QKV: part}, seeing_model).items():
        assert torch.equal(tensor, expected[name][8:24]), name


def test_a_parameter_cut_from_a_larger_tensor_keeps_no_more_than_itself(
    seeing_model: PreTrainedModel,
) -> None:
    conversions = find_conversions(seeing_model, {QKV: (96, 32)})
    tensors = [(QKV, torch.randn(96, 32))]
    fill_parameters(seeing_model, tensors, conversions, torch.float32, lambda _: (), True)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = seeing_model.get_parameter(f"model.vision_tower.layers.0.attn.{name}.weight")
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


def test_one_weight_is_split_into_several_by_what_a_rank_has_of_each() -> None:
    sample = VARIANTS["molmo2"]
    with torch.device("meta"):
        model = sample.model_class(sample.model_class.config_class(**sample.config))
    name = "model.transformer.blocks.0.self_attn.att_proj.weight"
    (conversion,) = find_conversions(model, {name: (256, 64)})  # q, k and v of 128, 64 and 64
    part = {name: torch.arange(128)[:, None].expand(128, 64)}
    converted = conversion.run(part, model, lambda _: (64, 32, 32))
    assert [tensor[:, 0].tolist() for _, tensor in sorted(converted.items())] == [
        [*range(64, 96)], [*range(64)], [*range(96, 128)],
    ]  # fmt: skip
