"""Patterns that name layers by their kind: numbered once a config is known, strict before."""

from typing import Any

import pytest

from shardkit.errors import RecipeError
from shardkit.recipe import compose_recipe
from shardkit.recipe.parse import parse_recipe

TEXT = """
model_types = ["any"]
[layer_kinds]
full = { pattern = 0, layer_types = "full" }
sliding = { pattern = 1, layer_types = "sliding" }
[units]
heads = "num_heads"
kv_heads = { count = ["swa_heads", "2 num_kv"], shared_by = "heads" }
full_kv_heads = { count = "num_kv", shared_by = "heads" }
[column]
"layers.*.q_proj" = "heads"
"layers.*[sliding].k_proj" = "kv_heads"
"layers.*[full].k_proj" = "full_kv_heads"
[module_attributes]
"layers.*[full]" = { groups = "heads/full_kv_heads" }
"""
CONFIG: dict[str, Any] = {"model_type": "any", "num_heads": 8, "num_kv": 2}


@pytest.mark.parametrize(
    "config", [{"pattern": [0, 1, 1]}, {"layer_types": ["full", "sliding", "sliding"]}]
)
def test_a_kind_is_the_layers_that_a_list_of_the_config_says(config: dict[str, Any]) -> None:
    recipe = compose_recipe(parse_recipe("any", TEXT.encode()), CONFIG | config)
    units = {
        name: recipe.rule_for(f"layers.{name}.k_proj").terms[0].unit for name in ("0", "1", "2")
    }
    assert units == {"0": "full_kv_heads", "1": "kv_heads", "2": "kv_heads"}
    assert recipe.rules_for("layers.3.k_proj") == []
    assert recipe.rule_for("layers.3.q_proj").terms[0].unit == "heads"
    assert [rule.module for rule in recipe.module_attributes] == ["layers.{0}"]
    assert recipe.rule_for("layers.2.k_proj").stated_pattern == "layers.*[sliding].k_proj"


def test_a_layer_that_predicts_further_tokens_is_as_the_last_one() -> None:
    config = CONFIG | {"pattern": [0, 1], "num_nextn_predict_layers": 2}
    recipe = compose_recipe(parse_recipe("any", TEXT.encode()), config)
    assert recipe.rule_for("layers.3.k_proj").terms[0].unit == "kv_heads"
    assert recipe.rules_for("layers.4.k_proj") == []


def test_a_count_may_be_in_the_entry_of_a_kind_s_first_layer() -> None:
    text = TEXT.replace('count = "num_kv", ', 'count = ["per.*[full].kv", "num_kv"], ')
    recipe = compose_recipe(parse_recipe("any", text.encode()), CONFIG | {"pattern": [1, 0, 0]})
    assert recipe.units["full_kv_heads"].fields == ("per.1.kv", "num_kv")
    none = compose_recipe(parse_recipe("any", text.encode()), CONFIG | {"pattern": [1]})
    assert none.units["full_kv_heads"].fields == ("num_kv",)


def test_a_kind_that_no_layer_is_of_has_no_rule() -> None:
    recipe = compose_recipe(parse_recipe("any", TEXT.encode()), CONFIG | {"pattern": [1, 1]})
    assert recipe.module_attributes == ()
    assert [rule.stated_pattern for rule in recipe.rules[:2]] == [
        "layers.*.q_proj", "layers.*[sliding].k_proj",
    ]  # fmt: skip


def test_a_config_without_the_lists_is_refused() -> None:
    with pytest.raises(RecipeError, match="no list pattern or layer_types"):
        compose_recipe(parse_recipe("any", TEXT.encode()), CONFIG)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("*[full].k_proj", "*[wide].k_proj", r"\*\[wide\]: not one of \[layer_kinds\]"),
        ("[units]", "none = { pattern = 2 }\n[units]", "layer_kinds.none: no pattern names it"),
        ("pattern = 0,", "pattern = [0],", r"layer_kinds.full.pattern: \[0\] is not a plain value"),
        ('{ pattern = 1, layer_types = "sliding" }', "1", "layer_kinds.sliding: must be"),
    ],
)
def test_a_wrong_kind_is_an_error(old: str, new: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        parse_recipe("any", TEXT.replace(old, new, 1).encode())
