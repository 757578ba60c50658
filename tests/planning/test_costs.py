"""What a plan costs: cases that the fixtures of real models do not have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardkit.planning import Plan, make_plan
from shardkit.planning.collectives import count_collectives
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache, find_compute_dtype
from shardkit.planning.kv_copies import KvCopies, find_kv_copies
from shardkit.planning.parts import generates_text
from shardkit.planning.summary import collapse_names, summarize_plan
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.parse import load_recipe
from shardkit.tensor import TensorSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "architectures": ["LlamaForCausalLM"],
}
T5: dict[str, Any] = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "num_heads": 4, "d_ff": 32, "num_layers": 2,
    "num_decoder_layers": 1,
}  # fmt: skip


def specs(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> list[TensorSpec]:
    return [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]


def llama(tp_size: int, dtype: str = "F32", **config: Any) -> Plan:
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 16),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (16, 16),
        f"{layer}.mlp.down_proj.weight": (16, 32),
        "model.norm.weight": (16,),
    }
    return make_plan(
        specs(shapes, dtype), find_recipe({"model_type": "llama"}), {**LLAMA, **config}, tp_size
    )


def layers_of_llama(count: int, **config: Any) -> Plan:
    one = [p.spec for p in llama(1).placements]
    shapes = {
        spec.name.replace("layers.0", f"layers.{layer}"): spec.shape
        for layer in range(count)
        for spec in one
    }
    config = {**LLAMA, "num_hidden_layers": count, **config}
    return make_plan(specs(shapes), find_recipe({"model_type": "llama"}), config, 2)


def t5(tp_size: int) -> Plan:
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (64, 16)}
    sides = [("encoder", 0, ("0.SelfAttention", "1")), ("encoder", 1, ("0.SelfAttention", "1"))]
    sides += [("decoder", 0, ("0.SelfAttention", "1.EncDecAttention", "2"))]  # type: ignore[list-item]
    for side, block, layers in sides:
        *attentions, mlp = (f"{side}.block.{block}.layer.{layer}" for layer in layers)
        for attention in attentions:
            shapes |= {f"{attention}.{part}.weight": (32, 16) for part in "qkv"}
            shapes |= {f"{attention}.o.weight": (16, 32)}
        shapes |= {f"{mlp}.DenseReluDense.wi.weight": (32, 16)}
        shapes |= {f"{mlp}.DenseReluDense.wo.weight": (16, 32)}
    return make_plan(specs(shapes), find_recipe({"model_type": "t5"}), T5, tp_size)


def test_an_encoder_s_sums_are_counted_once_per_prompt() -> None:
    found = count_collectives(t5(2), T5)
    # Two encoder blocks of two sums and the embedding; one decoder block of three, and its own.
    assert (found.encoder, found.row_parallel, found.embedding) == (5, 3, 1)
    assert (found.all_gathers, found.is_tied) == (1, True)


def test_a_decoder_s_cache_has_the_decoder_s_layers_and_stated_head_width() -> None:
    cache = estimate_kv_cache(t5(2), T5)
    assert cache == KvCache(layers=1, head_dim=8, dtype="F32", kv_heads=(2, 2), is_crossed=True)


def test_an_lstm_gathers_once_for_each_layer() -> None:
    shapes = {"embedding.weight": (11, 6), "output.weight": (11, 8)}
    for layer, width in enumerate((6, 8)):
        shapes |= {f"lstm.weight_ih_l{layer}": (32, width), f"lstm.weight_hh_l{layer}": (32, 8)}
    config = {"model_type": "lstm", "hidden_size": 8}
    found = count_collectives(make_plan(specs(shapes), find_recipe(config), config, 2), config)
    assert (found.gathered, found.output, found.all_reduces) == (2, 1, 1)


def test_a_stated_head_width_wins_over_hidden_size_by_heads() -> None:
    # 16 / 4 heads would be 4; the k_proj itself says 8 rows of 1 kv head.
    cache = estimate_kv_cache(llama(2, num_key_value_heads=1), LLAMA)
    assert isinstance(cache, KvCache)
    assert cache.head_dim == 8


def test_a_unit_of_two_kv_heads_counts_as_two() -> None:
    config = {
        "model_type": "diffllama", "num_attention_heads": 8, "num_key_value_heads": 4,
        "hidden_size": 32, "num_hidden_layers": 3, "dtype": "float32",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.0.self_attn.{part}_proj.weight": (16, 32) for part in "kv"
    }
    plan = make_plan(specs(shapes), find_recipe(config), {**config, "intermediate_size": 8}, 2)
    assert estimate_kv_cache(plan, config) == KvCache(
        layers=1, head_dim=4, dtype="F32", kv_heads=(2, 2)
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"mem_len": 512}, "mem_len"),
        ({"index_head_dim": 128}, "index_head_dim"),
    ],
)
def test_a_cache_that_cannot_be_told_is_unknown(config: dict[str, Any], reason: str) -> None:
    cache = estimate_kv_cache(llama(2), {**LLAMA, **config})
    assert isinstance(cache, str)
    assert cache.startswith("unknown: ")
    assert reason in cache


def test_a_latent_is_kept_whole_by_every_rank_in_place_of_keys_and_values() -> None:
    cache = estimate_kv_cache(llama(2), {**LLAMA, "kv_lora_rank": 24, "qk_rope_head_dim": 8})
    assert cache == KvCache(layers=1, head_dim=32, dtype="F32", kv_heads=(1, 1), tensors=1)
    assert isinstance(cache, KvCache)
    assert cache.rank_bytes == (32 * 4, 32 * 4)


@pytest.mark.parametrize("config", [{"state_size": 16}, {"lru_width": 64}, {"use_lang_emb": True}])
def test_a_model_that_keeps_no_keys_says_so(config: dict[str, Any]) -> None:
    assert str(estimate_kv_cache(llama(2), {**LLAMA, **config})).startswith("none: ")


def test_layers_without_weights_for_keys_keep_none() -> None:
    cache = estimate_kv_cache(llama(2), {**LLAMA, "num_hidden_layers": 9})
    assert isinstance(cache, KvCache)
    assert cache.layers == 1


def test_layers_that_use_another_s_keys_keep_none() -> None:
    config = {**LLAMA, "num_hidden_layers": 3, "num_kv_shared_layers": 2}
    cache = estimate_kv_cache(layers_of_llama(3), config)
    assert isinstance(cache, KvCache)
    assert cache.layers == 1


def test_a_layer_that_is_used_many_times_is_summed_as_often() -> None:
    config = {**LLAMA, "num_hidden_layers": 12, "num_hidden_groups": 1}
    assert count_collectives(llama(2), config).row_parallel == 2 * 12


def test_layers_that_only_predict_further_tokens_cost_nothing() -> None:
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    longer, shorter = layers_of_llama(3, **config), layers_of_llama(2)
    assert summarize_plan(longer).loaded_bytes == summarize_plan(shorter).loaded_bytes
    assert summarize_plan(longer).stored_bytes > summarize_plan(shorter).stored_bytes
    found, expected = (count_collectives(plan, LLAMA) for plan in (longer, shorter))
    assert found == expected
    cache = estimate_kv_cache(longer, {**LLAMA, **config})
    assert isinstance(cache, KvCache)
    assert cache.layers == 2


def test_kv_heads_that_do_not_divide_are_copies_with_the_sizes_that_avoid_them() -> None:
    assert find_kv_copies(llama(2), LLAMA) is None
    assert find_kv_copies(llama(4), LLAMA) == KvCopies(2, 2.0, 2.0, (2,))
    # 4 heads over 3 ranks are 2, 1 and 1; with 2 kv heads the ranks hold 1, 1 and 1.
    assert find_kv_copies(llama(3), LLAMA) == KvCopies(2, 1.5, 1.5, (2,))


def test_a_latent_on_every_rank_is_copied_as_often_as_there_are_ranks() -> None:
    copies = find_kv_copies(llama(2), {**LLAMA, "kv_lora_rank": 24})
    assert copies is not None
    assert (copies.cache_growth, copies.weight_growth) == (2.0, 1.0)


def test_sliding_windows_keep_keys_and_values_like_any_layer() -> None:
    config = {**LLAMA, "layer_types": ["sliding_attention"]}
    assert isinstance(estimate_kv_cache(llama(2), config), KvCache)


def test_a_text_model_inside_another_is_read_from_its_own_config() -> None:
    config = {"text_config": {"dtype": "float16"}, "dtype": "float32"}
    cache = estimate_kv_cache(llama(2), config)
    assert isinstance(cache, KvCache)
    assert cache.dtype == "F16"


def test_the_config_s_dtype_is_what_a_model_runs_in_and_else_the_weights_own() -> None:
    plan = llama(2, dtype="BF16")
    assert find_compute_dtype(plan, {"torch_dtype": "float32"}) == "F32"
    assert find_compute_dtype(plan, {"dtype": "float16", "torch_dtype": "float32"}) == "F16"
    assert find_compute_dtype(plan, {}) == "BF16"
    assert find_compute_dtype(llama(2, dtype="F8_E4M3"), {}) is None


def test_a_key_and_a_value_kept_whole_are_one_kv_head_on_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "mqa.toml"
    path.write_text(
        'model_types = ["mqa"]\n[units]\nheads = "num_heads"\n[column]\n"attn.qkv" = "heads + 2"\n'
    )
    config = {"num_heads": 4, "hidden_size": 16, "num_layers": 1, "dtype": "float16"}
    plan = make_plan(specs({"attn.qkv.weight": (24, 16)}), load_recipe(path), config, 2)
    cache = estimate_kv_cache(plan, config)
    assert cache == KvCache(layers=1, head_dim=4, dtype="F16", kv_heads=(1, 1))
    summary = summarize_plan(plan)
    (group,) = summary.groups
    assert group.treatment == "partly replicated"
    # Each rank: 2 of 4 heads and both of k and v, 4 rows of 16 floats each; 8 rows are held twice.
    assert summary.stored_bytes == (16 * 16 * 4, 16 * 16 * 4)
    assert summary.replicated_bytes == 8 * 16 * 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"architectures": ["ModernBertForMaskedLM"]}, False),
        ({"architectures": ["BloomModel"]}, True),
        ({"architectures": 7}, True),
        ({}, True),
    ],
)
def test_what_generates_is_told_from_the_architecture(
    config: dict[str, Any], expected: bool
) -> None:
    assert generates_text(llama(2), config) is expected


def test_an_embedding_without_an_output_on_disk_gathers_its_own_logits_once() -> None:
    found = count_collectives(llama(2), LLAMA)
    assert (found.row_parallel, found.embedding, found.output, found.is_tied) == (2, 1, 1, True)
    assert (found.all_reduces, found.all_gathers) == (3, 1)


def test_the_imbalance_is_named_by_the_group_that_adds_most_to_it() -> None:
    plan = llama(3)
    summary = summarize_plan(plan)
    found = summary.imbalance
    stored = summary.stored_bytes
    assert found.largest == 0
    assert found.ratio == max(stored) * 3 / sum(stored)
    assert found.cause is not None
    # q_proj and o_proj: 8 of 16 rows on rank 0, where 5 1/3 would be even.
    assert found.cause.pattern == "model.layers.0.self_attn.q_proj.weight"
    assert sum(stored) - summary.total_bytes == summary.replicated_bytes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.7.w"], "h.7.w"),
        (["h.0.w", "h.1.w", "h.2.w"], "h.{0..2}.w"),
        (["h.0.w", "h.2.w", "h.3.w"], "h.{0,2..3}.w"),
        (["h.0.e.0.w1", "h.0.e.1.w1", "h.1.e.0.w1", "h.1.e.1.w1"], "h.{0..1}.e.{0..1}.w1"),
        ([f"h.{n}.w" for n in range(0, 40, 2)], "h.{0..38: 20}.w"),
        (["dense_4h_to_h.weight"], "dense_4h_to_h.weight"),
        (["0.w", "1.w"], "{0..1}.w"),
    ],
)
def test_layer_numbers_are_collapsed(names: list[str], expected: str) -> None:
    assert collapse_names(names) == expected


def test_layers_of_another_shape_are_a_group_of_their_own() -> None:
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(3)]
    shapes = dict(zip(names, [(16,), (24,), (16,)], strict=True))
    config = {**LLAMA, "num_hidden_layers": 3}
    plan = make_plan(specs(shapes), find_recipe(config), config, 2)
    found = [(g.pattern, g.count, g.rank_bytes) for g in summarize_plan(plan).groups]
    assert found == [
        ("model.layers.{0,2}.input_layernorm.weight", 2, (128, 128)),
        ("model.layers.1.input_layernorm.weight", 1, (96, 96)),
    ]
