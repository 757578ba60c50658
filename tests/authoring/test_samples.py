"""Samples: configs kept as data, also of types whose models are another type's."""

from pathlib import Path

import pytest

from shardkit.authoring.model_classes import list_classes
from shardkit.authoring.samples import Sample, make_sample
from shardkit.checkpoint import read_config

SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8}


@pytest.mark.parametrize(
    ("model_type", "model"), [("gpt-sw3", "GPT2LMHeadModel"), ("internlm3", "LlamaForCausalLM")]
)
def test_a_type_without_a_model_of_its_own_has_another_s(model_type: str, model: str) -> None:
    sample = Sample("any", model, {"model_type": model_type})
    assert sample.model_type == sample.stored_config["model_type"] == model_type
    assert model in [cls.__name__ for cls in list_classes(model_type)]


def test_its_config_json_has_its_own_name(tmp_path: Path) -> None:
    sample = Sample("any", "GPT2LMHeadModel", {"model_type": "gpt-sw3", **SIZES})
    assert read_config(make_sample(sample, tmp_path / "model"))["model_type"] == "gpt-sw3"


def test_a_type_that_has_models_has_its_own_only() -> None:
    names = {cls.__name__ for cls in list_classes("gemma3_text")}
    assert "Gemma3ForCausalLM" in names
    assert "Gemma3ForConditionalGeneration" not in names
