"""Models that see: their configs inside configs, their inputs, their costs, their names on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardkit.authoring.masked_sum import load_reference
from shardkit.authoring.proof import prove_recipe
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import RecipeError
from shardkit.planning import Plan, make_plan
from shardkit.planning.collectives import count_collectives
from shardkit.planning.kv_cache import estimate_kv_cache
from shardkit.planning.parts import generates_text
from shardkit.recipe.catalog import find_recipe
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.tolerance import compare_outputs, worst_output
from tests.helpers.model_samples import make
from tests.helpers.synthetic_checkpoints import specs_of

LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "mistral", "num_attention_heads": 16, "num_hidden_layers": 5},
    "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 4},
}
LLAVA_SHAPES: dict[str, tuple[int, ...]] = {
    "language_model.model.embed_tokens.weight": (32, 32),
    "language_model.lm_head.weight": (32, 32),
    "language_model.model.layers.0.self_attn.k_proj.weight": (16, 32),
    "language_model.model.layers.0.self_attn.o_proj.weight": (32, 32),
    "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight": (8, 8),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight": (8, 3072),
    "multi_modal_projector.linear_2.weight": (32, 32),
}


def plan_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> Plan:
    return make_plan(specs_of(shapes or {}), find_recipe(config), config, 2)


def counts(config: dict[str, Any]) -> dict[str, int | None]:
    return {name: unit.count for name, unit in plan_of(config).units.items()}


def test_a_field_left_out_of_a_config_inside_another_is_that_classes_default() -> None:
    found = counts(LLAVA)
    # Mistral's 8 kv heads and 14336 wide MLP; CLIP's 3072.
    assert (found["heads"], found["kv_heads"], found["ffn"]) == (16, 8, 14336)
    assert (found["vision_heads"], found["vision_ffn"]) == (4, 3072)


def test_a_config_inside_another_that_names_no_type_is_of_the_outer_classes_own() -> None:
    config = {"model_type": "gemma3", "text_config": {"num_attention_heads": 16}}
    found = counts({**config, "vision_config": {"model_type": "siglip_vision_model"}})
    assert (found["kv_heads"], found["vision_heads"]) == (4, 12)
    assert counts({"model_type": "qwen2_vl"})["kv_heads"] == 8, "whole tables may be left out"


def test_a_config_inside_another_that_may_be_of_any_type_must_name_it() -> None:
    config = {"model_type": "gemma3", "text_config": {}, "vision_config": {"hidden_size": 64}}
    with pytest.raises(RecipeError, match="vision_config: model_type '': no recipe"):
        plan_of(config)


def test_older_configs_keep_the_text_model_s_fields_outermost() -> None:
    config = {
        "model_type": "qwen2_vl", "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vision_config": {"num_heads": 20},
    }  # fmt: skip
    found = counts(config)
    assert (found["heads"], found["kv_heads"], found["ffn"]) == (28, 4, 18944)
    assert found["vision_heads"] == 20


def test_what_sees_sums_once_per_prompt_and_keeps_no_cache() -> None:
    plan = plan_of(LLAVA, LLAVA_SHAPES)
    found = count_collectives(plan, LLAVA)
    assert (found.encoder, found.row_parallel, found.embedding, found.output) == (3, 1, 1, 1)
    cache = estimate_kv_cache(plan, LLAVA)
    assert not isinstance(cache, str)
    assert (cache.layers, cache.head_dim, cache.kv_heads) == (1, 2, (4, 4))


def test_layers_that_only_the_class_counts_are_counted_by_their_weights() -> None:
    config = {**LLAVA, "text_config": {"model_type": "mistral", "num_attention_heads": 16}}
    plan = plan_of(LLAVA, LLAVA_SHAPES)
    assert estimate_kv_cache(plan, config) == estimate_kv_cache(plan, LLAVA)


def test_layers_named_an_encoder_generate_if_the_class_does() -> None:
    config = {
        "model_type": "qianfan_ocr", "architectures": ["QianfanOCRForConditionalGeneration"],
        "text_config": {"model_type": "qwen3", "num_attention_heads": 32},
        "vision_config": {"model_type": "qianfan_ocr_vision"},
    }  # fmt: skip
    name = "language_model.model.encoder.layers.0.self_attn.o_proj.weight"
    plan = plan_of(config, {name: (32, 32)})
    assert generates_text(plan, config) is True
    assert generates_text(plan, {**config, "architectures": ["T5EncoderModel"]}) is False


def test_a_model_that_only_sees_produces_no_text() -> None:
    config = {
        "model_type": "pixtral", "architectures": ["PixtralVisionModel"],
        "num_attention_heads": 4, "intermediate_size": 8,
    }  # fmt: skip
    plan = plan_of(config, {"transformer.layers.0.attention.o_proj.weight": (8, 8)})
    assert generates_text(plan, config) is False
    assert estimate_kv_cache(plan, config) == "none: an encoder keeps no cache"


@pytest.mark.parametrize(
    ("sample", "places"),
    [
        ("llava", 16),
        ("qwen2_5_vl", 24),
        ("gemma3", 4),
        ("smolvlm", 4),
        # A whole image, two tiles of 4 rows and 4 columns, and a new line after each row.
        ("llava_next", 16 + 32 + 4),
        ("deepseek_vl", 16),
    ],
)
def test_texts_have_as_many_places_as_an_image_fills(
    sample: str, places: int, tmp_path: Path
) -> None:
    model = load_reference(make(sample, tmp_path / "model"))
    ids = make_inputs(model)["input_ids"]
    # 24 tokens of text, none of which stands for an image, a video or the start of either.
    assert ids.shape == (2, 24 + places)
    assert ((ids == 205).sum(-1) == places).all()
    assert not (ids > 205).all(-1).any()
    assert torch.equal(ids, make_inputs(model)["input_ids"]), "the same every time"


def test_of_several_outputs_the_one_furthest_off_is_judged() -> None:
    truth = {"logits": torch.linspace(-1, 1, 64), "image_embeds": torch.ones(64)}
    wrong = {**truth, "image_embeds": torch.full((64,), 1.1)}
    name, found = worst_output(wrong, truth, truth, torch.float32)
    assert (name, found.ok) == ("image_embeds", False)
    assert worst_output(truth, truth, truth, torch.float32)[1].ok
    with pytest.raises(KeyError):
        worst_output({"logits": truth["logits"]}, truth, truth, torch.float32)


def test_few_values_that_are_exact_by_chance_are_allowed_the_others_rounding() -> None:
    truth = {"embeds": torch.linspace(-1, 1, 64), "score": torch.ones(1)}
    own = {**truth, "embeds": truth["embeds"] * (1 + 1e-5)}
    ours = {**own, "score": torch.full((1,), 1 + 1e-5)}
    assert not compare_outputs(ours["score"], own["score"], truth["score"], torch.float32).ok
    assert worst_output(ours, own, truth, torch.float32)[1].ok
    ours["score"] += 1e-3
    assert worst_output(ours, own, truth, torch.float32)[0] == "score"
    assert not worst_output(ours, own, truth, torch.float32)[1].ok


RENAMED = {
    "an encoder's own prefix": ("llava", {"vision_tower.": "vision_tower.vision_model."}),
    "names that begin with the model's": (
        "llava",
        {
            "language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head",
            "vision_tower.": "model.vision_tower.", "multi_modal_": "model.multi_modal_",
        },
    ),
    "the same of another layout": (
        "qwen2_5_vl", {"model.": "model.language_model.", "visual.": "model.visual."},
    ),
    "layers that transformers saves under another name": (
        "kimi_k25",
        {
            "language_model.model.blocks": "language_model.model.layers",
            "model.mm_projector": "mm_projector",
        },
    ),
    "an encoder saved with its prefix": ("clip-vision", {"": "vision_model."}),
}  # fmt: skip


@pytest.mark.parametrize("what", RENAMED)
def test_names_that_real_checkpoints_have_are_served(
    what: str, rank_pool: RankPool, tmp_path: Path
) -> None:
    sample, renamings = RENAMED[what]
    folder = make(sample, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    renamed = {renamed_by(renamings, name): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    recipe = find_recipe(json.loads((folder / "config.json").read_text()))
    proof = prove_recipe(folder, recipe, rank_pool.of(2), tmp_path)
    assert proof.passed, proof.checks[-1]


def renamed_by(renamings: dict[str, str], name: str) -> str:
    old = next((old for old in renamings if name.startswith(old)), None)
    return name if old is None else renamings[old] + name.removeprefix(old)


def test_stacked_experts_may_be_stored_either_way_round(
    tmp_path: Path, rank_pool: RankPool
) -> None:
    source = make("qwen3_vl_moe", tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    stacks = {name for name in weights if ".mlp.experts." in name}
    assert len(stacks) == 6
    turned = {n: t.transpose(1, 2).contiguous() if n in stacks else t for n, t in weights.items()}
    save_file(turned, source / "model.safetensors", metadata={"format": "pt"})
    recipe = find_recipe(json.loads((source / "config.json").read_text()))
    proof = prove_recipe(source, recipe, rank_pool.of(2), tmp_path)
    assert proof.passed, proof.checks
