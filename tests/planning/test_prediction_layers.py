"""Layers that predict further tokens: cut as the layers that they are made of, and not loaded."""

from typing import Any

import pytest

from shardkit.errors import RecipeError
from shardkit.planning import make_plan, summarize_plan
from shardkit.recipe import find_recipe, parse_recipe
from tests.helpers.synthetic_checkpoints import specs_of

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LAYER: dict[str, tuple[int, ...]] = {
    "layers.0.self_attn.q_proj.weight": (64, 16),
    "layers.0.self_attn.o_proj.weight": (16, 32),
    "layers.0.mlp.experts.0.up_proj.weight": (8, 16),
    "layers.0.input_layernorm.weight": (16,),
    "norm.weight": (16,),
}
SHAPES = {
    **{f"model.{name}": shape for name, shape in LAYER.items()},
    **{f"mtp.{name}": shape for name, shape in LAYER.items()},
    "mtp.fc.weight": (16, 32),
    "mtp.pre_fc_norm_hidden.weight": (16,),
}


def test_they_are_cut_by_the_rules_of_the_layers_they_are_made_of() -> None:
    plan = make_plan(specs_of(SHAPES), find_recipe(CONFIG), CONFIG, 2)
    placements = {p.spec.name: p for p in plan.placements}
    for name in LAYER:
        model, prediction = placements[f"model.{name}"], placements[f"mtp.{name}"]
        assert (model.style, model.dim, model.sections) == (
            prediction.style, prediction.dim, prediction.sections,
        )  # fmt: skip
    loaded = {name for name, p in placements.items() if p.is_loaded}
    assert loaded == {f"model.{name}" for name in LAYER}


def test_rank_0_holds_no_more_of_them_than_what_is_whole() -> None:
    plan = make_plan(specs_of(SHAPES), find_recipe(CONFIG), CONFIG, 2)
    summary = summarize_plan(plan)
    whole = 2 * (16 * 32 + 3 * 16)  # fc and three norms, in a dtype of two bytes
    assert summary.stored_bytes[0] - summary.stored_bytes[1] == whole
    assert summary.loaded_bytes[0] == summary.loaded_bytes[1]


@pytest.mark.parametrize("entry", ['mtp = "mtp.layers"', "mtp = 3", 'mtp = "{a,b}"', '"m*" = "a"'])
def test_an_entry_that_names_no_other_module_is_refused(entry: str) -> None:
    text = f'model_types = ["x"]\nreplicate = ["a"]\n[prediction_layers]\n{entry}\n'
    with pytest.raises(RecipeError, match=r"prediction_layers\."):
        parse_recipe("x", text.encode())
