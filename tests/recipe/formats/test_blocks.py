"""Whole blocks on every rank: how units are dealt out, and where what stores a weight is cut."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import LayoutError, RecipeError
from shardkit.layout import Section, Span, cover_spans, kv_head_mode, num_indices, rank_spans
from shardkit.layout.style import COLUMN, GATHER
from shardkit.planning import (
    Layout,
    Mesh,
    Placement,
    PlacementTable,
    Plan,
    count_shared_bytes,
    list_shared_blocks,
    make_plan,
    summarize_plan,
)
from shardkit.planning.quantized import place_part, place_parts
from shardkit.recipe import find_recipe
from shardkit.recipe.formats import find_schemes, group_quantized
from shardkit.tensor import TensorSpec

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512,
    "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 256, "quantization_config": FP8, "tie_word_embeddings": True,
}  # fmt: skip


def make_llama(ffn: int, fields: dict[str, Any], tp_size: int) -> Plan:
    """A plan of a Llama of one layer in FP8 with blocks of 128, without a weight."""
    config = {**LLAMA, "intermediate_size": ffn, **fields}
    hidden, width = config["hidden_size"], config["head_dim"]
    rows = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    rows["v"] = rows["k"]
    shapes = {f"self_attn.{n}_proj": (count * width, hidden) for n, count in rows.items()}
    shapes |= {"self_attn.o_proj": (hidden, rows["q"] * width), "mlp.down_proj": (hidden, ffn)}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    specs = [
        TensorSpec("model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)),
        TensorSpec("model.norm.weight", "BF16", (hidden,)),
        TensorSpec("model.layers.0.input_layernorm.weight", "BF16", (hidden,)),
        TensorSpec("model.layers.0.post_attention_layernorm.weight", "BF16", (hidden,)),
    ]
    for name, (out, inputs) in shapes.items():
        blocks = -(-out // 128), -(-inputs // 128)
        specs.append(TensorSpec(f"model.layers.0.{name}.weight", "F8_E4M3", (out, inputs)))
        specs.append(TensorSpec(f"model.layers.0.{name}.weight_scale_inv", "F32", blocks))
    return make_plan(specs, find_recipe(config), config, tp_size)


def list_local(plan: Plan, name: str) -> list[tuple[int, ...]]:
    placement = next(p for p in plan.placements if p.spec.name == f"model.layers.0.{name}")
    shards = [placement.shard_spec(rank) for rank in plan.mesh.ranks()]
    return [shard.shape for shard in shards if shard]


@pytest.mark.parametrize(
    ("ffn", "tp_size", "rows"),
    [
        (1536, 8, [256] * 4 + [128] * 4),  # as MiniMax-M2 over 8, where 192 would cut a block
        (1536, 4, [384] * 4),
        (320, 2, [256, 64]),  # the last block is a part of one
        (320, 3, [128, 128, 64]),
        (200, 2, [128, 72]),
        (576, 2, [384, 192]),
    ],
)
def test_blocks_are_dealt_out_whole_and_the_last_may_be_short(
    ffn: int, tp_size: int, rows: list[int]
) -> None:
    fields = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    plan = make_llama(ffn, fields, tp_size)
    for name in ("gate_proj", "up_proj"):
        assert list_local(plan, f"mlp.{name}.weight") == [(size, 512) for size in rows]
        scales = [(-(-size // 128), 4) for size in rows]
        assert list_local(plan, f"mlp.{name}.weight_scale_inv") == scales
    assert list_local(plan, "mlp.down_proj.weight") == [(512, size) for size in rows]
    assert list_local(plan, "mlp.down_proj.weight_scale_inv") == [(4, -(-s // 128)) for s in rows]


def test_heads_that_end_inside_of_a_block_stay_together() -> None:
    """Two kv heads of 64 are in a block of 128, and the four query heads go with them."""
    plan = make_llama(512, {}, 2)
    assert plan.units["heads"].blocks == {8: 4}
    assert list_local(plan, "self_attn.k_proj.weight") == [(128, 512)] * 2
    assert [plan.count_local_units("heads", rank) for rank in plan.mesh.ranks()] == [4, 4]


def test_ranks_share_blocks_if_there_are_fewer_than_ranks() -> None:
    """Each of 4 ranks has a kv head of 64, and stores the block of 128 that it is half of."""
    plan = make_llama(512, {}, 4)
    assert [plan.count_local_units("heads", rank) for rank in plan.mesh.ranks()] == [2] * 4
    assert list_local(plan, "self_attn.q_proj.weight") == [(128, 512)] * 4
    assert list_local(plan, "self_attn.k_proj.weight") == [(128, 512)] * 4
    assert list_local(plan, "self_attn.k_proj.weight_scale_inv") == [(1, 4)] * 4
    codes = next(p for p in plan.placements if p.spec.name.endswith("k_proj.weight"))
    wanted = [cover.wanted for rank in plan.mesh.ranks() for cover in codes.layout.cover(rank)]
    assert wanted == [((0, 64),), ((64, 128),)] * 2
    copies = 2 * 4 * (64 * 512 + 64 * 32 // 256)  # of k and v, what ranks do not compute
    assert (count_shared_bytes(plan), count_shared_bytes(make_llama(512, {}, 2))) == (copies, 0)
    assert list_shared_blocks(plan) == ["8 heads in blocks of 4", "4 kv_heads in blocks of 4"]
    assert plan.weights.names == make_llama(512, {}, 2).weights.names
    rows = [placement.shard_spec(plan.mesh.rank(1)) for placement in plan.weights]
    assert (64, 512) in [spec.shape for spec in rows if spec and "k_proj" in spec.name]


def test_a_hidden_width_of_fewer_blocks_than_ranks_is_divided_evenly() -> None:
    """1,280 in 10 blocks of 128 over 16 ranks: 80 each, which lie in one block or in two."""
    fields = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    plan = make_llama(1280, fields, 16)
    rows = [-(-(80 * r + 80) // 128) * 128 - 80 * r // 128 * 128 for r in range(16)]
    assert set(rows) == {128, 256}
    assert list_local(plan, "mlp.up_proj.weight") == [(size, 512) for size in rows]
    assert list_local(plan, "mlp.down_proj.weight_scale_inv") == [(4, s // 128) for s in rows]


def test_kv_heads_of_a_whole_block_are_replicated_as_ever() -> None:
    fields = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    plan = make_llama(512, fields, 4)
    assert list_local(plan, "self_attn.k_proj.weight") == [(128, 512)] * 4
    assert list_local(plan, "self_attn.k_proj.weight_scale_inv") == [(1, 4)] * 4


def test_a_fused_weight_whose_parts_end_inside_of_a_block_is_stored_in_whole_blocks() -> None:
    """Gate and up of 320 rows in one weight: the third block has rows of both."""
    layout = Layout(COLUMN, 0, (Section(320, 1, repeat=2, block=128),), block_size=128)
    covers = [layout.cover(rank) for rank in Mesh(2).ranks()]
    assert covers[0] == ((0, 640, ((0, 256), (320, 576))),)
    assert covers[1] == ((256, 384, ((0, 64),)), (512, 640, ((192, 256),)))


def test_a_short_block_before_another_is_refused() -> None:
    with pytest.raises(LayoutError, match="the last indices of an axis of 200"):
        cover_spans([Span(100, 200), Span(0, 100)], 128, 200)


def test_what_is_not_quantized_is_cut_as_ever() -> None:
    plan = make_llama(512, {"num_key_value_heads": 8}, 2)
    plain = next(p for p in plan.placements if p.spec.name == "model.embed_tokens.weight")
    assert all(section.block == 1 for section in plain.sections)


def test_a_plan_counts_what_is_stored() -> None:
    plan = make_llama(512, {}, 2)
    summary = summarize_plan(plan)
    assert summary.total_bytes == sum(p.spec.nbytes for p in plan.placements)
    assert len(plan.weights) == len(plan.placements) - len(plan.grouping.weights)


def test_a_weight_that_runs_on_gathered_inputs_keeps_what_they_hold() -> None:
    """It is on every rank, and the runtime must know which inputs each rank has."""
    specs = [
        TensorSpec("a.weight", "F8_E4M3", (64, 256)),
        TensorSpec("a.weight_scale_inv", "F32", (1, 2)),
    ]
    grouping = group_quantized(specs, find_schemes({"quantization_config": FP8}))
    weight = grouping.weights["a.weight"]
    sections = (Section(4, 64),)
    placement = Placement(weight.make_spec("BF16"), Layout(GATHER, None, sections))
    groups = PlacementTable.of([placement]).groups
    codes, scale = place_parts([spec.name for spec in specs], groups, grouping)
    assert (codes.sections, scale.sections) == (sections, ())
    packed = replace(weight.codes, shape=(64, 128))
    with pytest.raises(LayoutError, match="runs on inputs gathered from all ranks, and is packed"):
        place_part(weight, weight.parts[0][0], packed, placement)


def test_a_weight_stored_the_other_way_round_is_refused() -> None:
    config = {
        "model_type": "gpt2", "n_embd": 256, "n_head": 4, "n_layer": 1, "vocab_size": 256,
        "quantization_config": FP8,
    }  # fmt: skip
    specs = [
        TensorSpec("transformer.h.0.attn.c_attn.weight", "F8_E4M3", (256, 768)),
        TensorSpec("transformer.h.0.attn.c_attn.weight_scale_inv", "F32", (2, 6)),
    ]
    with pytest.raises(RecipeError, match=r"stored \[in, out\], which FP8 in blocks does not"):
        make_plan(specs, find_recipe(config), config, 2)


@given(
    units=st.integers(1, 40), size=st.sampled_from([1, 16, 48, 64, 128, 192]),
    repeat=st.integers(1, 3), shared=st.sampled_from([0, 1, 3]), per=st.sampled_from([1, 8, 128]),
    merged=st.integers(1, 3), tp_size=st.integers(1, 6), factor=st.integers(1, 5),
)  # fmt: skip
def test_a_rank_stores_the_blocks_of_what_it_computes_and_no_more(
    units: int, size: int, repeat: int, shared: int, per: int, merged: int, tp_size: int,
    factor: int,
) -> None:  # fmt: skip
    """What is wanted of the stored blocks is what the rank has; each block has some of it."""
    section = Section(units, size, repeat, shared * units, block=factor)
    length, block = len(section), per * merged
    if section.max_tp_size < tp_size or length % block:
        return
    layout = Layout(COLUMN, 0, (section,), index_size=per, block_size=block)
    codes = Placement(TensorSpec("w", "I8", (length // per, 4)), layout)
    for rank in Mesh(tp_size).ranks():
        stored = [i for start, stop in codes.spans(rank) for i in range(start * per, stop * per)]
        wanted = [span for cover in layout.cover(rank) for span in cover.wanted]
        spans = rank_spans([section], rank.tp_rank, tp_size)
        computed = [i for start, stop in spans for i in range(start, stop)]
        assert [stored[i] for start, stop in wanted for i in range(start, stop)] == computed
        assert {i // block for i in stored} == {i // block for i in computed}
    assert codes.tiles(Mesh(tp_size))[-1].stop == length // per


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 8), st.integers(1, 8))
def test_blocks_of_heads_take_their_kv_heads_with_them(
    kv_heads: int, group_size: int, blocks: int, tp_size: int
) -> None:
    heads = kv_heads * group_size
    section = Section(kv_heads, 1, shared_by=heads, block=blocks * group_size)
    if -(-heads // section.block) < tp_size:
        return
    assert kv_head_mode(kv_heads, heads, tp_size, section.block) == "split"
    counts = [num_indices(rank_spans([section], rank, tp_size)) for rank in range(tp_size)]
    assert sum(counts) == kv_heads
