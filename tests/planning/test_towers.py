"""What a plan counts once per prompt: the towers of a model that also reads images or sound."""

from pathlib import Path

from shardkit.planning import make_plan
from shardkit.planning.collectives import count_collectives
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.parse import load_recipe
from tests.planning.test_costs import specs


def test_a_tower_is_known_by_its_units_where_its_modules_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "seeing.toml"
    path.write_text(
        'model_types = ["seeing"]\n[units]\nheads = "num_heads"\n'
        'kv_heads = { count = "num_heads", shared_by = "heads" }\nvision_heads = "num_heads"\n'
        'vision_kv = { count = "num_heads", shared_by = "vision_heads" }\n[column]\n'
        '"layers.*.k" = "kv_heads"\n"blocks.*.k" = "vision_kv"\n[row]\n'
        '"layers.*.o" = "heads"\n"blocks.*.o" = "vision_heads"\n'
        '"blocks.*.experts.o" = "vision_heads"\n[norm]\n"blocks.*.n" = "vision_heads"\n'
    )
    config = {"num_heads": 4, "num_key_value_heads": 4, "hidden_size": 16, "num_layers": 1}
    shapes: dict[str, tuple[int, ...]] = {
        f"{layers}.0.{name}.weight": (16, 16) for layers in ("layers", "blocks") for name in "ko"
    }
    shapes |= {"blocks.0.experts.o": (2, 16, 16), "blocks.0.n.weight": (16,)}
    plan = make_plan(specs(shapes), load_recipe(path), config, 2)
    counts = count_collectives(plan, config)
    assert (
        counts.encoder,
        counts.row_parallel,
        counts.expert_stacks,
        counts.norms,
    ) == (3, 1, 0, 0)
    cache = estimate_kv_cache(plan, config)
    assert cache == KvCache(layers=1, head_dim=4, dtype="F32", kv_heads=(2, 2))


def test_an_unembedding_is_an_output_and_no_second_table() -> None:
    config = {
        "model_type": "inkling2_text", "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 16, "num_hidden_layers": 1,
    }  # fmt: skip
    shapes = {f"model.llm.{name}.weight": (64, 16) for name in ("embed", "unembed")}
    counts = count_collectives(make_plan(specs(shapes), find_recipe(config), config, 2), config)
    assert (counts.embedding, counts.output, counts.is_tied) == (1, 1, False)
