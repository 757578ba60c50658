"""What a plan costs for text beside a tower, and for layers of unusual kinds."""

from pathlib import Path
from typing import Any

import pytest

from shardkit.planning import Plan, make_plan
from shardkit.planning.collectives import count_collectives
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache, list_kv_units
from shardkit.planning.parts import generates_text, predicts_tokens, select_text_fields
from shardkit.recipe.parse import load_recipe
from shardkit.tensor import TensorSpec

CONFIG = {"num_heads": 4, "hidden_size": 16, "num_layers": 1, "dtype": "float16"}
TOWER = "image_encoder.encoder.0.out"
TEXT = "model.encoder.0.out"
GENERATED = {"architectures": ["SomeForCausalLM"]}


def plan_of(folder: Path, rules: str, **shapes: tuple[int, ...]) -> Plan:
    path = folder / "some.toml"
    path.write_text(f'model_types = ["some"]\nunits = {{ heads = "num_heads" }}\n{rules}')
    tensors = [TensorSpec(name, "F16", shape) for name, shape in shapes.items()]
    return make_plan(tensors, load_recipe(path), CONFIG, 2)


@pytest.mark.parametrize(
    ("modules", "config", "expected"),
    [
        ([TEXT, TOWER], GENERATED, True),
        ([TEXT, TOWER], {"architectures": ["SomeForImageClassification"]}, False),
    ],
)
def test_layers_called_an_encoder_s_generate_if_their_class_does(
    modules: list[str], config: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    rules = "[row]\n" + "".join(f'"{module}" = "heads"\n' for module in modules)
    plan = plan_of(tmp_path, rules, **{f"{module}.weight": (16, 16) for module in modules})
    assert generates_text(plan, config) is expected


def test_a_module_on_gathered_inputs_is_one_gather_whatever_tensors_it_has(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "layers.0.norm_a.weight": (16,), "layers.0.norm_a.bias": (16,),
        "layers.0.norm_b.weight": (16,),
    }  # fmt: skip
    plan = plan_of(tmp_path, '[gather]\n"layers.*.{norm_a,norm_b}" = "heads"\n', **shapes)
    assert count_collectives(plan, CONFIG).gathered == 2


def test_padded_keys_and_values_are_kept_for_all_heads_on_every_rank(tmp_path: Path) -> None:
    shapes = {f"layers.0.attn.{name}.weight": (16, 16) for name in "qkv"}
    rules = '[{style}]\n"layers.*.attn.{{q,k,v}}" = "heads"\n'
    for style, kv_heads in {"padded": (4, 4), "column": (2, 2)}.items():
        plan = plan_of(tmp_path, rules.format(style=style), **shapes)
        cache = KvCache(layers=1, head_dim=4, dtype="F16", kv_heads=kv_heads)
        assert estimate_kv_cache(plan, CONFIG) == cache


def test_of_an_encoder_s_and_a_decoder_s_kv_heads_the_decoder_s_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    units = "".join(
        f'{side}_heads = "n"\n{side}_kv_heads = {{ count = "m", shared_by = "{side}_heads" }}\n'
        for side in ("encoder", "decoder")
    )
    rules = "".join(
        f'"{side}.q" = "{side}_heads"\n"{side}.k" = "{side}_kv_heads"\n'
        for side in ("encoder", "decoder")
    )
    path.write_text(f'model_types = ["two"]\n[units]\n{units}[column]\n{rules}')
    shapes = {f"{side}.{name}.weight": 16 for side in ("encoder", "decoder") for name in "qk"}
    tensors = [TensorSpec(name, "F16", (rows, 16)) for name, rows in shapes.items()]
    plan = make_plan(tensors, load_recipe(path), {"n": 4, "m": 2}, 2)
    assert list_kv_units(plan) == ["decoder_kv_heads"]


def test_a_decoder_with_a_table_of_its_own_is_the_language_model(tmp_path: Path) -> None:
    assert select_text_fields({"decoder": {"n_head": 4}, "dtype": "float16"})["n_head"] == 4
    plan = plan_of(tmp_path, f'[row]\n"{TEXT}" = "heads"\n"decoder.0.out" = "heads"\n')
    assert predicts_tokens(plan, {"architectures": ["SomeEncoderDecoderModel"]})
