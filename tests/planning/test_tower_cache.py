"""The kv cache of models with towers: whose heads count, and which layers keep something."""

from typing import Any

from shardkit.planning import make_plan
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache
from shardkit.recipe import compose_recipe, find_recipe
from tests.helpers.synthetic_checkpoints import specs_of

TWO_TOWERS: dict[str, Any] = {
    "model_type": "exaone4_5",
    "text_config": {
        "model_type": "exaone4", "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 4,
    },
    "vision_config": {"num_heads": 8, "num_key_value_heads": 4, "depth": 1},
}  # fmt: skip
CROSSED: dict[str, Any] = {
    "model_type": "mllama_text_model", "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "hidden_size": 16, "cross_attention_layers": [1],
}  # fmt: skip


def test_kv_heads_are_the_text_s_and_not_a_tower_s() -> None:
    layer, block = "model.language_model.layers.0.self_attn", "model.visual.blocks.0.attn"
    shapes = {
        f"{layer}.q_proj.weight": (16, 16), f"{layer}.k_proj.weight": (8, 16),
        f"{layer}.v_proj.weight": (8, 16), f"{block}.qkv.weight": (64, 32),
    }  # fmt: skip
    recipe = compose_recipe(find_recipe(TWO_TOWERS), TWO_TOWERS)
    plan = make_plan(specs_of(shapes, "F32"), recipe, TWO_TOWERS, 2)
    assert estimate_kv_cache(plan, TWO_TOWERS) == KvCache(1, 4, "F32", (1, 1))


def test_layers_that_attend_to_an_image_keep_nothing_of_a_token() -> None:
    layers = "model.layers.0.self_attn", "model.layers.1.cross_attn"
    shapes = {f"{layer}.{name}_proj.weight": (8, 16) for layer in layers for name in "kv"}
    plan = make_plan(specs_of(shapes, "F32"), find_recipe(CROSSED), CROSSED, 2)
    cache = estimate_kv_cache(plan, CROSSED)
    assert isinstance(cache, KvCache)
    assert cache.layers == 1
