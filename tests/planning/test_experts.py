"""Whole experts on each rank: which tensors are experts', where they lie, and what that costs."""

from typing import Any

import pytest

from shardkit.errors import CheckpointError, LayoutError, ShardkitError
from shardkit.planning import Expert, Mesh, Plan, count_collectives, make_plan, summarize_plan
from shardkit.recipe import find_recipe
from shardkit.tensor import TensorSpec
from tests.helpers.synthetic_checkpoints import Shapes, specs_of

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 5,
    "intermediate_size": 24, "hidden_size": 32,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_local_experts": 5,
    "intermediate_size": 24,
}  # fmt: skip
DBRX: dict[str, Any] = {
    "model_type": "dbrx", "n_heads": 4, "attn_config": {"kv_n_heads": 2},
    "ffn_config": {"ffn_hidden_size": 6, "moe_num_experts": 5},
}  # fmt: skip
LAYER = "model.layers.0."
ROUTED = f"{LAYER}block_sparse_moe."


def list_mixtral(num_experts: int = 5) -> Shapes:
    weights = {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}
    return {
        "model.embed_tokens.weight": (40, 32),
        f"{LAYER}self_attn.q_proj.weight": (32, 32),
        f"{LAYER}self_attn.o_proj.weight": (32, 32),
        f"{ROUTED}gate.weight": (num_experts, 32),
        **{
            f"{ROUTED}experts.{number}.{name}.weight": shape
            for number in range(num_experts)
            for name, shape in weights.items()
        },
        "lm_head.weight": (40, 32),
    }


def plan_mixtral(tp_size: int, shapes: Shapes | None = None) -> Plan:
    recipe = find_recipe(MIXTRAL)
    return make_plan(specs_of(shapes or list_mixtral()), recipe, MIXTRAL, tp_size, True)


def test_experts_that_are_stored_one_by_one_lie_whole_on_one_rank() -> None:
    plan = plan_mixtral(3)
    placed = {p.spec.name: p for p in plan.placements}
    ranks = [
        [
            rank.index
            for rank in plan.mesh.ranks()
            if placed[f"{ROUTED}experts.{n}.w2.weight"].spans(rank)
        ]
        for n in range(5)
    ]
    assert ranks == [[0], [0], [1], [1], [2]]
    assert placed[f"{ROUTED}experts.3.w1.weight"].expert == Expert(3, 5)
    assert placed[f"{ROUTED}gate.weight"].style.name == "replicate"
    assert placed[f"{LAYER}self_attn.o_proj.weight"].style.name == "row"
    assert plan.mesh == Mesh(3, 3)
    assert [rank.ep_rank for rank in plan.mesh.ranks()] == [0, 1, 2]


def test_an_experts_bytes_are_counted_on_its_rank() -> None:
    summary = summarize_plan(plan_mixtral(3))
    (gates,) = [g for g in summary.groups if g.pattern.endswith("w1.weight")]
    assert (gates.count, gates.counts) == (5, (2, 2, 1))
    assert gates.rank_bytes == (2 * 24 * 32 * 2, 2 * 24 * 32 * 2, 24 * 32 * 2)
    assert sum(summary.stored_bytes) - summary.replicated_bytes == summary.total_bytes


def test_a_stack_in_one_tensor_is_divided_by_its_experts() -> None:
    shapes = {
        f"{LAYER}mlp.experts.gate_up_proj": (5, 32, 48),
        f"{LAYER}mlp.experts.gate_up_proj_bias": (5, 48),
        f"{LAYER}mlp.experts.down_proj": (5, 24, 32),
        f"{LAYER}mlp.experts.down_proj_bias": (5, 32),
        f"{LAYER}mlp.router.weight": (5, 32),
    }
    plan = make_plan(specs_of(shapes), find_recipe(GPT_OSS), GPT_OSS, 2, True)
    shards = {p.spec.name: p.shard_spec(plan.mesh.rank(0)) for p in plan.placements}
    experts = {name: s.shape for name, s in shards.items() if s and ".experts." in name}
    assert experts == {name: (3, *shapes[name][1:]) for name in experts}
    assert len(experts) == 4
    router = shards[f"{LAYER}mlp.router.weight"]
    assert router is not None
    assert router.shape == (5, 32)


def test_experts_that_are_stacked_in_one_axis_are_not_cut() -> None:
    shapes = {
        f"transformer.blocks.0.ffn.experts.mlp.{name}": (30, 16) for name in ("w1", "v1", "w2")
    }
    plan = make_plan(specs_of(shapes), find_recipe(DBRX), DBRX, 2, True)
    for placement in plan.placements:
        assert [placement.spans(rank) for rank in plan.mesh.ranks()] == [((0, 18),), ((18, 30),)]
    assert plan.module_attributes
    assert not any("experts" in rule.module for rule in plan.module_attributes)


def test_one_sum_is_counted_for_each_stack() -> None:
    counts = count_collectives(plan_mixtral(2), MIXTRAL)
    assert (counts.row_parallel, counts.expert_stacks) == (1, 1)


def test_the_layout_stays_over_another_number_of_ranks() -> None:
    plan = plan_mixtral(3)
    assert plan.with_tp_size(1).with_tp_size(2) == plan_mixtral(2)
    assert plan.with_tp_size(1).mesh == Mesh(1)
    assert plan.max_tp_size == 5


@pytest.mark.parametrize(
    ("tp_size", "shapes", "error", "message"),
    [
        (
            4, list_mixtral(3), LayoutError,
            f"{ROUTED}experts.0.w1.weight: 3 experts cannot be divided over tp_size 4; this"
            " checkpoint divides over tp_size 1 to 3",
        ),
        (
            2, {n: s for n, s in list_mixtral().items() if ".experts.2." not in n}, CheckpointError,
            f"{ROUTED}experts: has expert 4, but no expert 2",
        ),
        (
            2, {n: s for n, s in list_mixtral().items() if ".experts.0." not in n}, CheckpointError,
            f"{ROUTED}experts: has expert 4, but no expert 0",
        ),
        (
            2, list_mixtral(0), LayoutError,
            "no tensor is of an expert that recipe 'mixtral' can place whole on a rank; split"
            " without --expert-parallel",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_distributed_is_refused(
    tp_size: int, shapes: Shapes, error: type[ShardkitError], message: str
) -> None:
    with pytest.raises(error) as caught:
        plan_mixtral(tp_size, shapes)
    assert str(caught.value) == message


def test_blocks_that_are_quantized_together_do_not_matter_to_whole_experts() -> None:
    """An FFN of 200 in blocks of 128 is 128 + 72 over 2 ranks; 5 experts are 3 + 2."""
    config = {
        **MIXTRAL,
        "intermediate_size": 200,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    specs = []
    for number in range(5):
        for name, shape in {"w1": (200, 32), "w2": (32, 200), "w3": (200, 32)}.items():
            blocks = tuple(-(-length // 128) for length in shape)
            weight = f"{ROUTED}experts.{number}.{name}.weight"
            specs.append(TensorSpec(weight, "F8_E4M3", shape))
            specs.append(TensorSpec(f"{weight}_scale_inv", "F32", blocks))
    divided = make_plan(specs, find_recipe(config), config, 2)
    assert divided.units["ffn"].blocks == {200: 128}
    plan = make_plan(specs, find_recipe(config), config, 4, True)
    assert {p.expert for p in plan.placements} == {Expert(number, 5) for number in range(5)}
    assert not any(unit.blocks for unit in plan.units.values())
