"""What a plan predicts against what ranks use: differences are found and named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shardkit.authoring.families_page import render_families
from shardkit.authoring.masked_sum import load_reference, plan_folder
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.usage_check import Figure, compare_usage, make_prompt
from shardkit.recipe.catalog import find_recipe, find_recipe_folder
from shardkit.recipe.parse import load_recipe
from shardkit.runtime.model_runner import ModelRunner
from shardkit.runtime.usage import measure_usage
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.models import ShardedModel
from tests.helpers.model_samples import VARIANTS, make
from tests.helpers.split_helpers import split_folder

FOUR_LAYERS = {"num_hidden_layers": 4, "num_hidden_groups": 2}  # each of two layers is used twice
WRONG = {
    "a layer that is used twice": (FOUR_LAYERS, {"all_reduces per token"}),
    "a latent": ({"kv_lora_rank": 5}, {"cache bytes"}),
    "a state of a fixed size": ({"state_size": 5}, {"cache bytes"}),
    "nothing wrong": ({}, set()),
    "what is unknown": ({"mem_len": 5}, set()),
}


def build(sample: str) -> PreTrainedModel:
    """A sample's model, its weights random."""
    cls = VARIANTS[sample].model_class
    model: PreTrainedModel = cls(cls.config_class(**VARIANTS[sample].config))
    return model.eval()


def test_a_wrong_prediction_is_found_and_named(rank_pool: RankPool, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    split_folder(source, tmp_path / "shards", 2)
    plan = plan_folder(source, find_recipe(config), 2)
    sharded, reference = ShardedModel(rank_pool.of(2)), load_reference(source)
    sharded.load(tmp_path / "shards", None)
    for case, (fields, names) in WRONG.items():
        figures = compare_usage(plan, {**config, **fields}, reference, sharded)
        assert {figure.name for figure in figures if figure.fault} == names, case


def test_a_prompt_keeps_the_images_that_no_token_stands_for() -> None:
    model = build("mllama")
    prompt = make_prompt(model, make_inputs(model))
    assert {"input_ids", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"} == {*prompt}
    assert {len(tensor) for tensor in prompt.values()} == {1}
    seeing = build("llava")
    assert {*make_prompt(seeing, make_inputs(seeing))} == {"input_ids"}


def test_a_number_that_is_not_predicted_is_no_fault() -> None:
    assert Figure("cache bytes", "unknown: who knows", (3, 4)).fault == ""
    assert Figure("cache bytes", (3, 4), (3, 4)).fault == ""
    assert "[3, 5], measured [3, 4]" in Figure("cache bytes", (3, 5), (3, 4)).fault


@pytest.mark.parametrize("is_measured", [True, False])
def test_the_page_shows_what_was_measured_where_it_was(is_measured: bool) -> None:
    plan = {
        "all_reduces per token": {"predicted": [5, 5], "measured": [5, 5]},
        "all_gathers per token": {"predicted": [1, 1], "measured": [1, 1]},
        "cache bytes": {"predicted": "unknown: why", "measured": [64, 64]},
        "weight bytes": {"predicted": [190720, 190208], "measured": [190720, 190208]},
    }
    proof: dict[str, Any] = {
        "sample": "llama", "model_type": "llama", "limitation": "", "tp_size": 2, "passed": True,
        "fault": "", "share": 0.5, "masked_sum": 1e-7, "numerics": {},
    }  # fmt: skip
    entry = {"digest": "", "proofs": [proof | ({"plan": plan} if is_measured else {})]}
    served = {
        "checkpoint": "big", "model_type": "llama", "refusal": "", "formats": ["FP8"],
        "tp8": "1.0 GB", "tp16": "refused: 9 heads", "ep8": "dense", "ep16": "dense",
    }  # fmt: skip
    page = render_families(
        [(load_recipe(find_recipe_folder() / "llama.toml"), entry | {"mutants": [], "forms": []})],
        {"other": "why not"},
        [served],
        {"FP8": 3},
        {"llama": "1 of 2"},
        {"llama": "8 of 9"},
    )
    row = "| big | FP8 | 1.0 GB / refused | dense / dense | 1, 3 in FP8 | 9 heads |"
    assert row in page
    assert "| other | why not |" in page
    assert "| 1 of 2 | 8 of 9 |" in page
    assert ("| 5 + 1 | 64 (unknown) | 190,720 |" in page) is is_measured
    assert ("## As planned" in page) is is_measured


def test_a_model_that_takes_no_text_alone_is_prompted_with_all_inputs() -> None:
    def build(name: str) -> PreTrainedModel:
        model: PreTrainedModel = VARIANTS[name].model_class(
            VARIANTS[name].model_class.config_class(**VARIANTS[name].config)
        )
        return model.eval()

    with_images, with_or_without = build("idefics"), build("llava")
    assert {"input_ids", "pixel_values"} <= make_prompt(
        with_images, make_inputs(with_images)
    ).keys()
    assert [*make_prompt(with_or_without, make_inputs(with_or_without))] == ["input_ids"]


@pytest.mark.parametrize(
    ("sample", "cache_bytes"),
    [
        ("blip", 1024),  # generates by a model inside of it, from an image
        ("udop", 1536),  # takes a box with each token
        ("evolla", 512),  # takes a protein beside the text
    ],
)
def test_the_cache_is_measured_of_models_that_take_more_than_text(
    sample: str, cache_bytes: int, tmp_path: Path
) -> None:
    model = load_reference(make(sample, tmp_path))
    inputs, counts = make_inputs(model), {"all_reduce": 0, "all_gather": 0}
    runner = ModelRunner(model, torch.device("cpu"))
    usage = measure_usage(runner, counts, inputs, make_prompt(model, inputs))
    assert usage.cache_bytes == cache_bytes
