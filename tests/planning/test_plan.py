"""Plans from names, shapes and a config alone: no weights, no torch, no model built."""

from collections.abc import Mapping
from typing import Any

import pytest

from shardkit.errors import LayoutError, RecipeError
from shardkit.planning import Mesh, Placement, Plan, make_plan
from shardkit.recipe.catalog import find_recipe
from shardkit.tensor import TensorSpec
from tests.helpers.synthetic_checkpoints import FAMILIES, Shapes, llama, llama_config, specs_of


def plan_of(shapes: Shapes, config: dict[str, Any], tp_size: int, dtype: str = "BF16") -> Plan:
    recipe = find_recipe(config)
    return make_plan(specs_of(shapes, dtype), recipe, config, tp_size)


def shards_of(plan: Plan, tp_rank: int) -> list[TensorSpec]:
    shards = (
        placement.shard_spec(Mesh(plan.tp_size).rank(tp_rank)) for placement in plan.placements
    )
    return [shard for shard in shards if shard is not None]


def shapes_of(plan: Plan, tp_rank: int) -> Shapes:
    return {shard.name: shard.shape for shard in shards_of(plan, tp_rank)}


def placement(plan: Plan, ending: str) -> Placement:
    (found,) = (p for p in plan.placements if p.spec.name.endswith(ending))
    return found


def under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


ATTENTION = {
    "self_attn.q_proj.weight": (16, 32), "self_attn.k_proj.weight": (8, 32),
    "self_attn.v_proj.weight": (8, 32), "self_attn.o_proj.weight": (32, 16),
}  # fmt: skip
ENDS = {"model.embed_tokens.weight": (20, 32), "lm_head.weight": (20, 32)}
EXPERT = {"w1.weight": (12, 32), "w2.weight": (32, 12), "w3.weight": (12, 32)}
SECOND_OF_TWO: dict[str, Shapes] = {  # what is smaller on rank 1 of 2
    "llama": ENDS
    | under("model.layers.0.", ATTENTION)
    | under("model.layers.0.self_attn.", {"q_proj.bias": (16,), "v_proj.bias": (8,)})
    | under("model.layers.0.mlp.", {
        "gate_proj.weight": (12, 32), "up_proj.weight": (12, 32), "down_proj.weight": (32, 12),
    }),
    "mixtral": ENDS
    | under("model.layers.0.", ATTENTION)
    | under("model.layers.0.block_sparse_moe.experts.0.", EXPERT)
    | under("model.layers.0.block_sparse_moe.experts.1.", EXPERT),
    "phi3": ENDS
    | under("model.layers.0.", {
        "self_attn.qkv_proj.weight": (24, 32), "self_attn.o_proj.weight": (32, 16),
        "mlp.gate_up_proj.weight": (24, 32), "mlp.down_proj.weight": (32, 12),
    }),
    "gpt2": {"wte.weight": (18, 12)}  # 3 heads: 2 + 1; a vocabulary of 37: 19 + 18
    | under("h.0.", {
        "attn.c_attn.weight": (12, 12), "attn.c_attn.bias": (12,), "attn.c_proj.weight": (4, 12),
        "mlp.c_fc.weight": (12, 25), "mlp.c_fc.bias": (25,), "mlp.c_proj.weight": (25, 12),
    }),
    "gpt_neox": {"gpt_neox.embed_in.weight": (20, 32), "embed_out.weight": (20, 32)}
    | under("gpt_neox.layers.0.", {
        "attention.query_key_value.weight": (48, 32), "attention.query_key_value.bias": (48,),
        "attention.dense.weight": (32, 16), "mlp.dense_h_to_4h.weight": (32, 32),
        "mlp.dense_4h_to_h.weight": (32, 32),
    }),
    "bloom": {"word_embeddings.weight": (20, 32)}
    | under("h.0.", {
        "self_attention.query_key_value.weight": (48, 32),
        "self_attention.query_key_value.bias": (48,), "self_attention.dense.weight": (32, 16),
        "mlp.dense_h_to_4h.weight": (64, 32), "mlp.dense_4h_to_h.weight": (32, 64),
    }),
    "falcon": {"transformer.word_embeddings.weight": (20, 24)}
    | under("transformer.h.0.", {
        "self_attention.query_key_value.weight": (20, 24),
        "self_attention.dense.weight": (24, 12), "mlp.dense_h_to_4h.weight": (48, 24),
        "mlp.dense_4h_to_h.weight": (24, 48),
    }),
    "t5": {"shared.weight": (16, 32)}  # a vocabulary of 33: 17 + 16
    | under("encoder.block.0.layer.", {
        "0.SelfAttention.q.weight": (16, 32), "0.SelfAttention.o.weight": (32, 16),
        "0.SelfAttention.relative_attention_bias.weight": (6, 4),
        "1.DenseReluDense.wi_0.weight": (12, 32), "1.DenseReluDense.wo.weight": (32, 12),
    }),
    "bert": {"bert.embeddings.word_embeddings.weight": (20, 32), "cls.predictions.bias": (20,)}
    | under("bert.encoder.layer.0.", {
        "attention.self.query.weight": (16, 32), "attention.self.query.bias": (16,),
        "attention.output.dense.weight": (32, 16), "intermediate.dense.weight": (12, 32),
        "output.dense.weight": (32, 12),
    }),
    "bart": {"model.shared.weight": (20, 32)}
    | under("model.decoder.layers.0.encoder_attn.", {
        "k_proj.weight": (16, 32), "out_proj.weight": (32, 16),
    })
    | under("model.encoder.layers.0.", {
        "self_attn.k_proj.weight": (16, 32), "fc1.weight": (12, 32), "fc1.bias": (12,),
        "fc2.weight": (32, 12),
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gets_its_local_shapes(family: str) -> None:
    config, shapes = FAMILIES[family]
    plan = plan_of(shapes, config, 2)
    ignored = {p.spec.name for p in plan.placements if p.style.name == "ignore"}
    expected = {**shapes, **SECOND_OF_TWO[family]}
    assert shapes_of(plan, 1) == {n: s for n, s in expected.items() if n not in ignored}
    assert ignored <= shapes_of(plan, 0).keys(), "rank 0 keeps what nothing loads"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_together_hold_every_divided_byte_once(family: str) -> None:
    config, shapes = FAMILIES[family]
    plan = plan_of(shapes, config, 2)
    for found in plan.placements:
        sizes = [
            s.nbytes if (s := found.shard_spec(Mesh(2).rank(rank))) else 0 for rank in range(2)
        ]
        copies = 1 if found.dim is not None or found.style.name == "ignore" else 2
        assert sum(sizes) == copies * found.spec.nbytes, found.spec.name


def test_over_one_rank_nothing_changes() -> None:
    for config, shapes in FAMILIES.values():
        assert shapes_of(plan_of(shapes, config, 1), 0) == shapes


def test_gpt2_takes_the_same_heads_of_q_k_and_v() -> None:
    config, shapes = FAMILIES["gpt2"]
    c_attn = placement(plan_of(shapes, config, 2), "c_attn.weight")
    assert c_attn.dim == 1, "Conv1D is stored [in, out]"
    assert c_attn.spans(Mesh(2).rank(0)) == ((0, 8), (12, 20), (24, 32))
    assert c_attn.spans(Mesh(2).rank(1)) == ((8, 12), (20, 24), (32, 36))


def test_a_row_parallel_bias_is_whole_on_every_rank() -> None:
    bias = placement(plan_of(llama(), llama_config(), 4), "o_proj.bias")
    assert (bias.style.name, bias.dim) == ("row", None)
    assert bias.shard_spec(Mesh(4).rank(3)) == bias.spec


def test_nine_heads_over_two_ranks_are_five_and_four() -> None:
    plan = plan_of(llama(9, 3, 2), llama_config(9, 3), 2)
    queries = [placement(plan, "q_proj.weight").shard_spec(Mesh(2).rank(rank)) for rank in range(2)]
    assert [shard.shape for shard in queries if shard] == [(10, 18), (8, 18)]
    # Of three kv heads shared by three each: 0 0 0 1 1 and 1 2 2 2, one copy for each query head.
    assert placement(plan, "k_proj.weight").spans(Mesh(2).rank(1)) == ((2, 6), (4, 6), (4, 6))


def test_kv_heads_are_replicated_when_tp_exceeds_them() -> None:
    plan = plan_of(llama(8, 2), llama_config(8, 2), 4)
    keys = placement(plan, "k_proj.weight")
    assert [keys.spans(Mesh(4).rank(rank)) for rank in range(4)] == [
        ((0, 4),),
        ((0, 4),),
        ((4, 8),),
        ((4, 8),),
    ]
    assert [plan.count_local_units("kv_heads", plan.mesh.rank(rank)) for rank in range(4)] == [
        1,
        1,
        1,
        1,
    ]
    assert [plan.count_local_units("heads", plan.mesh.rank(rank)) for rank in range(4)] == [
        2,
        2,
        2,
        2,
    ]


def test_kv_heads_are_expanded_where_ranks_would_use_them_unevenly() -> None:
    plan = plan_of(llama(14, 2), llama_config(14, 2), 4)
    keys = [placement(plan, "k_proj.weight").shard_spec(Mesh(4).rank(rank)) for rank in range(4)]
    assert [key.shape[0] // 4 for key in keys if key] == [4, 4, 3, 3]
    assert [plan.count_local_units("kv_heads", plan.mesh.rank(rank)) for rank in range(4)] == [
        4,
        4,
        3,
        3,
    ]


def test_odd_vocabularies_and_mlps_are_divided_without_padding() -> None:
    plan = plan_of(llama(ffn=23, vocab=41), llama_config(ffn=23), 4)
    assert [shapes_of(plan, r)["lm_head.weight"][0] for r in range(4)] == [11, 10, 10, 10]
    ups = [shapes_of(plan, r)["model.layers.0.mlp.up_proj.weight"][0] for r in range(4)]
    assert ups == [6, 6, 6, 5]


def test_a_tp_size_that_is_too_large_is_refused_with_the_tensor_and_the_sizes_that_work() -> None:
    with pytest.raises(LayoutError) as caught:
        plan_of(llama(8, 4), llama_config(8, 4), 9)
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj.weight: 8 heads cannot be divided over tp_size 9;"
        " this checkpoint divides over tp_size 1 to 8"
    )


def test_the_largest_tp_size_works_and_the_next_does_not() -> None:
    for config, shapes in FAMILIES.values():
        most = plan_of(shapes, config, 1).max_tp_size
        plan_of(shapes, config, most)
        with pytest.raises(LayoutError, match=f"1 to {most}$"):
            plan_of(shapes, config, most + 1)


@pytest.mark.parametrize("tp_size", [0, -1, 1025])
def test_a_tp_size_out_of_range_is_refused(tp_size: int) -> None:
    with pytest.raises(LayoutError, match=f"tp_size {tp_size} is not 1 to 1024"):
        plan_of(llama(), llama_config(), tp_size)


def test_packed_elements_that_cannot_be_cut_at_a_byte_are_refused_with_the_tensor() -> None:
    with pytest.raises(LayoutError) as caught:
        plan_of(llama(), llama_config(), 2, "F4")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert str(caught.value) == f"{name}: 4 bits of F4 do not end on a byte"


def test_a_tensor_no_rule_names_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^model.layers.0.extra.weight: no rule"):
        plan_of({**llama(), "model.layers.0.extra.weight": (4,)}, llama_config(), 2)


def test_an_axis_that_does_not_fit_the_config_is_refused_with_the_tensor() -> None:
    with pytest.raises(RecipeError, match=r"q_proj.weight: axis of 32 is not a multiple of 7 = 7"):
        plan_of(llama(), llama_config(7, 7), 1)


def test_a_scalar_under_a_divided_name_is_whole() -> None:
    plan = plan_of({"model.layers.0.mlp.up_proj.weight": ()}, llama_config(), 2)
    assert shapes_of(plan, 1) == {"model.layers.0.mlp.up_proj.weight": ()}


def kv_heads(config: dict[str, Any]) -> int | None:
    recipe = find_recipe(config)
    return make_plan([], recipe, config, 1).units["kv_heads"].count


def test_a_field_the_config_leaves_out_is_its_classes_default() -> None:
    without = {"model_type": "mistral", "num_attention_heads": 16, "intermediate_size": 24}
    assert kv_heads(without) == 8


def test_a_field_the_config_sets_to_null_is_as_many_as_share_it() -> None:
    config = {"model_type": "mistral", "num_attention_heads": 16, "intermediate_size": 24}
    assert kv_heads({**config, "num_key_value_heads": None}) == 16


@pytest.mark.parametrize("heads", [8, 40, 64])
def test_a_default_that_depends_on_another_field_follows_this_configs_own(heads: int) -> None:
    # Llama's first configs have no num_key_value_heads, which its class leaves to the heads.
    config = {"model_type": "llama", "num_attention_heads": heads, "intermediate_size": 24}
    assert kv_heads(config) == heads


def test_a_field_that_nobody_knows_is_refused() -> None:
    config = {"model_type": "unheard-of", "num_attention_heads": 8}
    with pytest.raises(RecipeError, match=r"config.json: no intermediate_size, .* 'llama'"):
        make_plan([], find_recipe({"model_type": "llama"}), config, 1)


@pytest.mark.parametrize("value", [-8, 0, 8.0, "8", True, [8], {"n": 8}, 1 << 33, 1e400])
def test_a_count_that_is_no_count_is_refused_with_the_field(value: object) -> None:
    config = {**llama_config(), "num_attention_heads": value}
    with pytest.raises(RecipeError, match=r"config.json: num_attention_heads is .*1 to 4294967296"):
        plan_of(llama(), config, 2)


def test_heads_that_are_no_multiple_of_their_kv_heads_are_refused() -> None:
    with pytest.raises(RecipeError, match="8 heads cannot share 3 kv_heads"):
        plan_of(llama(), llama_config(8, 3), 2)


def test_a_model_type_that_is_no_string_is_not_looked_up() -> None:
    config = {"model_type": ["llama"], "num_attention_heads": 8}
    with pytest.raises(RecipeError, match="no intermediate_size"):
        make_plan([], find_recipe({"model_type": "llama"}), config, 1)


def test_the_same_layout_over_another_size_needs_no_recipe() -> None:
    plan = plan_of(llama(), llama_config(), 2)
    assert plan.with_tp_size(4) == plan_of(llama(), llama_config(), 4)
    with pytest.raises(LayoutError):
        plan.with_tp_size(9)


def test_a_unit_without_a_count_has_no_local_count() -> None:
    with pytest.raises(LayoutError, match="unit 'vocab' has no count"):
        plan_of(llama(), llama_config(), 2).count_local_units("vocab", Mesh(2).rank(0))
