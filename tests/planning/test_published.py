"""Quantized checkpoints as published: real names, shapes and dtypes, planned over 8 ranks."""

import pytest

from shardkit.errors import ShardkitError
from shardkit.planning import make_plan, summarize_plan
from shardkit.recipe import find_recipe
from tests.helpers.published import expand_names, read_published_config, read_published_specs
from tests.helpers.real_inputs import shared
from tests.write_published import PAGE, render_published

# The formats, the largest rank over the mean, and what is dealt out in blocks.
PLANS = {
    "deepseek-r1": ({"fp8-block"}, 1.0, {"heads": {128: 2}, "ffn": {2048: 128, 18432: 128}}),
    "deepseek-v4-flash-0731": (
        {"fp8-block-scale", "fp4-pairs"},
        1.0,
        {"ffn": {2048: 128}, "half_groups": {16: 2}, "groups": {8: 2}},
    ),
    "kimi-k2.5": ({"pack-quantized"}, 1.0, {"ffn": {2048: 32}}),
    "minimax-m2.7": ({"fp8-block"}, 1.32, {"ffn": {1536: 128}}),
}


@pytest.mark.parametrize("name", PLANS)
def test_published_checkpoints_plan_over_8(name: str) -> None:
    shared("fixtures")
    config, specs = read_published_config(name), read_published_specs(name)
    plan = make_plan(specs, find_recipe(config), config, 8)
    formats, imbalance, blocks = PLANS[name]
    summary = summarize_plan(plan)
    assert {scheme.format.name for scheme in plan.grouping.schemes} == formats
    assert {unit: dict(u.blocks) for unit, u in plan.units.items() if u.blocks} == blocks
    assert summary.imbalance.ratio == pytest.approx(imbalance, abs=0.005)
    assert summary.total_bytes == sum(spec.nbytes for spec in specs)
    scales = [spec.name for spec in specs if "scale" in spec.name.rpartition(".")[2]]
    assert {name for name in scales if name.endswith(("_inv", ".scale", "weight_scale"))} <= (
        plan.grouping.codes_by_part.keys()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("kimi-k3", "model_type 'kimi_k3': no recipe for it"), ("mimo-v2.5", "no recipe for it")],
)
def test_published_checkpoints_that_transformers_has_not_are_refused(
    name: str, message: str
) -> None:
    shared("fixtures")
    config = read_published_config(name)
    with pytest.raises(ShardkitError, match=message):
        find_recipe(config)


def test_ranges_in_tables_are_names() -> None:
    assert [*expand_names("a.0-2.w")] == ["a.0.w", "a.1.w", "a.2.w"]
    assert [*expand_names("a.2,4,...,8,9-10.w")] == [f"a.{n}.w" for n in (2, 4, 6, 8, 9, 10)]


@pytest.mark.slow
def test_the_page_of_published_checkpoints_is_what_is_planned() -> None:
    shared("fixtures")
    assert PAGE.read_text() == render_published()
