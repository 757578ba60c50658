"""Recipes composed of the recipes of their parts."""

from typing import Any

import pytest

from shardkit.errors import RecipeError
from shardkit.recipe import Recipe, compose_recipe, parse_recipe, resolve_units
from shardkit.recipe.compose import list_alternatives

RECIPE = b"""
model_types = ["pair"]
base_model_prefix = "model"
replicate = ["model.joint"]

[parts]
text_config = "model.language_model"
vision_config = "{model.,}vision_tower"
"""
CONFIG = {
    "model_type": "pair",
    "text_config": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2,
                    "intermediate_size": 96},
    "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 4,
                      "intermediate_size": 32},
}  # fmt: skip


def compose(config: dict[str, Any] | None = None, recipe: bytes = RECIPE) -> Recipe:
    return compose_recipe(parse_recipe("pair", recipe), config or CONFIG)


@pytest.mark.parametrize(
    ("tensor", "style", "unit"),
    [
        ("model.language_model.layers.0.self_attn.q_proj.weight", "column", "heads"),
        ("language_model.model.layers.0.self_attn.q_proj.weight", "column", "heads"),
        ("lm_head.weight", "vocab", "vocab"),
        ("language_model.lm_head.weight", "vocab", "vocab"),
        ("model.vision_tower.encoder.layers.1.mlp.fc1.bias", "column", "vision_ffn"),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight", "row", "vision_ffn"),
    ],
)
def test_a_part_s_tensors_follow_its_own_recipe(tensor: str, style: str, unit: str) -> None:
    rule = compose().rule_for(tensor)
    assert (rule.style.name, [term.unit for term in rule.terms]) == (style, [unit])


def test_the_outer_recipe_s_own_rules_count_too() -> None:
    assert compose().rule_for("model.joint.weight").style.name == "replicate"


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.layers.0.self_attn.q_proj.weight",
        "model.language_model.encoder.layers.1.mlp.fc1.bias",
        "vision_model.encoder.layers.1.mlp.fc1.bias",
    ],
)
def test_a_part_s_rules_name_nothing_outside_of_it(tensor: str) -> None:
    with pytest.raises(RecipeError, match="no rule"):
        compose().rule_for(tensor)


def test_units_are_counted_by_the_part_s_own_fields() -> None:
    units = resolve_units(compose(), CONFIG)
    counts = {name: unit.count for name, unit in units.items()}
    assert counts == {
        "vocab": None, "heads": 8, "kv_heads": 2, "ffn": 96, "vision_heads": 4, "vision_ffn": 32,
    }  # fmt: skip
    assert units["kv_heads"].shared_by == 8


def test_attributes_are_those_of_the_part_s_modules() -> None:
    (attribute,) = compose().module_attributes
    assert attribute.module == "language_model.{model.,}layers.*.self_attn"


def test_an_older_config_with_the_text_s_fields_outermost_is_read() -> None:
    recipe = RECIPE.replace(
        b'"model.language_model"', b'{ module = "model.language_model", recipe = "llama" }'
    )
    config = {"model_type": "pair", "num_attention_heads": 8, "intermediate_size": 96}
    assert resolve_units(compose(config, recipe), config)["heads"].count == 8


def test_a_table_left_out_is_that_of_the_classes_own_type() -> None:
    recipe = RECIPE.replace(b"vision_config", b"vision_settings")
    config = {"model_type": "gemma3"}  # whose text model is its own, and its vision encoder any
    units = resolve_units(compose(config, recipe), config)
    assert (units["heads"].count, units["kv_heads"].count) == (8, 4)


def test_a_part_that_the_config_leaves_out_has_no_rules() -> None:
    config = {**CONFIG, "vision_config": None}
    with pytest.raises(RecipeError, match="no rule"):
        compose(config).rule_for("vision_tower.encoder.layers.1.mlp.fc1.bias")


def test_the_digest_is_of_all_the_recipes() -> None:
    other = {**CONFIG, "vision_config": {"model_type": "pixtral"}}
    assert len({compose().sha256, compose(other).sha256, parse_recipe("pair", RECIPE).sha256}) == 3


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        ({"model_type": "none-such"}, "text_config: model_type 'none-such': no recipe"),
        ({"model_type": "qwen3_vl"}, "parts.text_config: recipe 'qwen3_vl' has parts itself"),
    ],
)
def test_a_part_that_cannot_be_composed_is_refused(
    text_config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        compose({**CONFIG, "text_config": text_config})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b'"{a,b}.{c,d}"', "more than one"),
        (b'{ recipe = "llama" }', "must be"),
        (b'{ module = "m", other = "x" }', "must be"),
        (b"3", "must be a string"),
    ],
)
def test_a_part_written_wrong_is_refused_by_its_key(entry: bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"parts.text_config.*{message}"):
        parse_recipe("pair", RECIPE.replace(b'"model.language_model"', entry))


def test_the_alternatives_of_a_module() -> None:
    assert list_alternatives("visual") == ("visual",)
    assert list_alternatives("{a,b.c}.d") == ("a.d", "b.c.d")
