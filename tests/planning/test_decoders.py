"""What a plan counts of a decoder: beside an encoder, in stacks, and in blocks layers share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardkit.planning import Plan, make_plan
from shardkit.planning.collectives import count_collectives
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache
from shardkit.planning.parts import generates_text
from shardkit.recipe.parse import load_recipe
from tests.planning.test_costs import specs

WIDTH = 16
CONFIG: dict[str, Any] = {"num_heads": 4, "hidden_size": WIDTH}
UNITS = '[units]\nheads = "num_heads"\n'


def plan(
    tmp_path: Path,
    layers: Mapping[str, int],
    config: Mapping[str, Any],
    tables: tuple[str, ...] = (),
) -> Plan:
    """A plan of lists of layers, each with a key and an output weight, and of tables."""
    path = tmp_path / "deciding.toml"
    rules = "".join(
        f'[{style}]\n"{{{",".join(layers)}}}.*.{leaf}" = "heads"\n'
        for style, leaf in (("column", "k"), ("row", "o"))
    )
    vocab = f'vocab = ["{{{",".join((*tables, "none"))}}}"]\n'
    path.write_text(f'model_types = ["deciding"]\n{vocab}{UNITS}{rules}')
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.{at}.{leaf}.weight": (WIDTH, WIDTH)
        for name, count in layers.items()
        for at in range(count)
        for leaf in "ko"
    }
    shapes |= {f"{table}.weight": (64, WIDTH) for table in tables}
    return make_plan(specs(shapes), load_recipe(path), config, 2)


def test_a_decoder_may_call_its_list_of_layers_an_encoder(tmp_path: Path) -> None:
    config = {"num_heads": 4, "decoder": {"hidden_size": WIDTH, "num_attention_heads": 4}}
    small = plan(tmp_path, {"encoder.layer": 2, "decoder.bert.encoder.layer": 1}, config)
    counted = count_collectives(small, config)
    assert (counted.encoder, counted.row_parallel) == (2, 1)
    assert estimate_kv_cache(small, config) == KvCache(1, 4, "F32", (2, 2), is_crossed=True)


def test_a_causal_model_may_call_its_layers_an_encoder(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["AnyForCausalLM"]}
    small = plan(tmp_path, {"encoder.layers": 1}, config)
    assert generates_text(small, config)
    assert not generates_text(small, {**config, "is_decoder": False}), "it was told not to"
    assert not generates_text(small, {**config, "architectures": ["AnyModel"]})


@pytest.mark.parametrize(
    ("other", "cached"),
    [
        ("encoder_kv_heads", KvCache(1, 4, "F32", (2, 2), is_crossed=True)),
        ("cross_kv_heads", KvCache(1, 4, "F32", (2, 2), is_crossed=False)),
    ],
)
def test_of_several_kinds_of_kv_heads_the_decoder_s_are_cached(
    tmp_path: Path, other: str, cached: KvCache
) -> None:
    assert estimate_kv_cache(plan_kv(tmp_path, "decoder_kv_heads", other), CONFIG) == cached


def test_of_several_kinds_of_kv_heads_none_may_be_the_decoder_s(tmp_path: Path) -> None:
    cache = estimate_kv_cache(plan_kv(tmp_path, "byte_kv_heads", "patch_kv_heads"), CONFIG)
    assert isinstance(cache, str)
    assert "which unit" in cache


def plan_kv(tmp_path: Path, own: str, other: str) -> Plan:
    """A plan of a decoder's keys beside keys that another unit counts."""
    path = tmp_path / "keys.toml"
    unit = '{ count = "num_heads", shared_by = "heads" }'
    path.write_text(
        f'model_types = ["keys"]\n{UNITS}{own} = {unit}\n{other} = {unit}\n[column]\n'
        f'"decoder.layers.*.k" = "{own}"\n"encoder.layers.*.k" = "{other}"\n'
        '[row]\n"{encoder,decoder}.layers.*.o" = "heads"\n'
    )
    shapes: dict[str, tuple[int, ...]] = {
        f"{side}.layers.0.{leaf}.weight": (WIDTH, WIDTH)
        for side in ("encoder", "decoder")
        for leaf in "ko"
    }
    return make_plan(specs(shapes), load_recipe(path), CONFIG, 2)


def test_an_output_layer_is_known_by_its_bias_or_its_name(tmp_path: Path) -> None:
    small = plan(tmp_path, {"layers": 1}, CONFIG, tables=("embed", "proj_out"))
    counted = count_collectives(small, CONFIG)
    assert (counted.embedding, counted.output) == (1, 1)
    path = tmp_path / "biased.toml"
    path.write_text('model_types = ["biased"]\nvocab = ["embed", "mlp.layer0"]\n')
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (64, WIDTH), "mlp.layer0.weight": (64, WIDTH), "mlp.layer0.bias": (64,)
    }  # fmt: skip
    small = make_plan(specs(shapes), load_recipe(path), CONFIG, 2)
    counted = count_collectives(small, CONFIG)
    assert (counted.embedding, counted.output, counted.is_tied) == (1, 1, False)


def test_stacks_that_take_turns_are_counted_as_often_as_they_run(tmp_path: Path) -> None:
    config = {**CONFIG, "num_layers_per_stack": 2, "num_hidden_layers": 12}
    small = plan(tmp_path, {"model.low.layers": 2, "model.high.layers": 2}, config)
    assert count_collectives(small, config).row_parallel == 12
    cache = estimate_kv_cache(small, config)
    assert isinstance(cache, KvCache)
    assert cache.layers == 12


def test_a_block_that_layers_share_is_counted_for_each_of_them(tmp_path: Path) -> None:
    config = {**CONFIG, "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"]}
    path = tmp_path / "sharing.toml"
    path.write_text(
        f'model_types = ["sharing"]\n{UNITS}[column]\n"layers.*.shared_transformer.k" = "heads"\n'
        '[row]\n"layers.*.shared_transformer.o" = "heads"\n"layers.*.mamba.o" = "heads"\n'
    )
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{at}.mamba.o.weight": (16, 16) for at in range(4)
    }
    shapes |= {
        f"layers.{at}.shared_transformer.{leaf}.weight": (16, 16) for at in (1, 2) for leaf in "ko"
    }
    small = make_plan(specs(shapes), load_recipe(path), config, 2)
    assert count_collectives(small, config).row_parallel == 4 + 3
    cache = estimate_kv_cache(small, config)
    assert isinstance(cache, KvCache)
    assert cache.layers == 3


@pytest.mark.parametrize(
    ("fields", "lookups"),
    [
        ({}, 1),
        ({"encoder_hash_byte_group_size": [3, 4, 5]}, 3),
        (
            {"encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_nb_functions": 2},
            4,
        ),
    ],
)
def test_a_table_of_hashes_is_looked_up_for_each_length(
    tmp_path: Path, fields: dict[str, Any], lookups: int
) -> None:
    config = {**CONFIG, **fields}
    small = plan(tmp_path, {"layers": 1}, config, tables=("hashes",))
    assert count_collectives(small, config).embedding == lookups


def test_a_prompt_with_sound_is_looked_up_twice_by_some_models(tmp_path: Path) -> None:
    config = {**CONFIG, "has_lora_adapter": False}
    small = plan(tmp_path, {"layers": 1}, config, tables=("embed",))
    assert count_collectives(small, config).encoder == 1
    assert count_collectives(small, CONFIG).encoder == 0


def test_an_encoder_that_reads_features_looks_up_no_tokens(tmp_path: Path) -> None:
    config = {**CONFIG, "composer_vocab_size": 3}
    small = plan(tmp_path, {"encoder.block": 1, "decoder.block": 1}, config, tables=("shared",))
    assert count_collectives(small, config).encoder == 1
    assert count_collectives(small, CONFIG).encoder == 2
