"""Recipes composed of the recipes of their parts."""

from pathlib import Path
from typing import Any

import pytest

from shardkit.authoring.samples import find_samples
from shardkit.errors import RecipeError
from shardkit.recipe import Recipe, compose_recipe, find_recipe, parse_recipe, resolve_units
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.compose import list_alternatives

RECIPE = b"""
model_types = ["pair"]
base_model_prefix = "model"
replicate = ["model.joint"]

[parts]
text_config = "model.language_model"
vision_config = "{model.,}vision_tower"
"""
TWO_PARTS = RECIPE.replace(
    b'"{model.,}vision_tower"',
    b'["{model.,}vision_tower", { module = "model", recipe = "granite_qformers" }]',
)
MAX_LINES = 12  # of a recipe made by composition
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


def compose_bundled(model_type: str) -> Recipe:
    config = {"model_type": model_type}
    return compose_recipe(find_recipe(config), config)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("vision_tower.blocks.0.attn.proj.weight", "vision_tower.encoder.blocks.0.wo.weight"),
        ("vision_tower.blocks.0.mlp.fc1.weight", "vision_tower.encoder.blocks.0.mlp.fc0.weight"),
        ("vision_tower.blocks.0.mlp.fc2.weight", "vision_tower.encoder.blocks.0.mlp.fc1.weight"),
    ],
)
def test_a_name_that_another_class_stores_has_the_rule_of_the_first_class_s(
    name: str, other: str
) -> None:
    recipe = compose_bundled("kimi_k25")
    rule, expected = recipe.rule_for(name), recipe.rule_for(other)
    assert (rule.style, rule.terms) == (expected.style, expected.terms)


@pytest.mark.parametrize(("number", "style"), [(0, "column"), (3, "row")])
def test_a_rule_for_one_number_is_for_it_under_the_other_name_too(number: int, style: str) -> None:
    name = f"audio_tower.asr_encoder.layers.0.ffn.net.{number}.weight"
    assert compose_bundled("nemo_speechlm").rule_for(name).style.name == style


def test_a_part_of_a_model_that_is_saved_alone_has_the_rules_of_the_part() -> None:
    rule = compose_bundled("prophetnet").rule_for("layers.0.feed_forward.output.weight")
    assert rule.style.name == "row"


def test_a_rule_for_the_name_as_it_is_goes_before_one_without_its_prefix() -> None:
    assert compose_bundled("beit").rule_for("layernorm.weight").pattern == "layernorm"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_buffer_that_two_classes_have_has_one_rule(prefix: str) -> None:
    recipe = compose_bundled("qwen2_vl")
    assert recipe.rule_for(f"{prefix}visual.rotary_pos_emb.inv_freq").style.name == "ignore"


@pytest.mark.parametrize("path", list_recipe_files(), ids=lambda path: path.stem)
def test_a_recipe_of_images_made_by_composition_is_a_short_list_of_parts(path: Path) -> None:
    """A part with more than a rule or two is a recipe of its own."""
    recipe = parse_recipe(path.stem, path.read_bytes())
    lines = [line.strip() for line in path.read_text().splitlines()]
    stated = [line for line in lines if line and not line.startswith("#")]
    samples = find_samples(recipe) if recipe.parts else []
    reads_images = any("vision_config" in str(sample.config) for sample in samples)
    assert not reads_images or len(stated) <= MAX_LINES


def test_two_parts_may_read_one_table() -> None:
    vision = {"model_type": "siglip_vision_model", "num_attention_heads": 4, "hidden_size": 256}
    config = {**CONFIG, "vision_config": {**vision, "intermediate_size": 32}}
    recipe = compose(config, TWO_PARTS)
    tower = recipe.rule_for("vision_tower.encoder.layers.1.mlp.fc1.bias")
    assert tower.terms[0].unit == "vision_ffn"
    name = "layerwise_projectors.0.qformer.encoder.layer.0.attention.attention.key.weight"
    for prefix in ("", "model."):  # the module is the base model itself
        assert recipe.rule_for(prefix + name).terms[0].unit == "vision_qformer_heads"
    attributes = {rule.module for rule in recipe.module_attributes}
    assert any(module.startswith("{layerwise,spatial}_projectors.") for module in attributes)
    assert resolve_units(recipe, config)["vision_qformer_heads"].count == 4


def test_two_parts_of_one_table_name_their_units_differently() -> None:
    twice = TWO_PARTS.replace(b"granite_qformers", b"clip_vision")
    with pytest.raises(RecipeError, match=r"parts.vision_config: two parts have a unit 'vision_"):
        compose(recipe=twice)


def test_a_recipe_that_others_name_needs_no_model_types() -> None:
    assert parse_recipe("part", b'part_only = true\nreplicate = ["norm"]').model_types == ()
    for text in (b'replicate = ["norm"]', b"part_only = true\nmodel_types = []"):
        with pytest.raises(RecipeError, match="model_types is missing or empty"):
            parse_recipe("part", text)
