"""What configs say of quantization, wherever they say it, and what no format describes."""

import json
from pathlib import Path
from typing import Any

import pytest

from shardkit.authoring.format_samples import list_format_samples
from shardkit.checkpoint import read_config
from shardkit.errors import RecipeError
from shardkit.recipe.formats import find_schemes, list_formats
from shardkit.recipe.formats.format import parse_format
from tests.helpers.published import PUBLISHED, read_published_config
from tests.helpers.real_inputs import shared

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}
CODES = {"suffix": "weight", "dtypes": ["F8_E4M3"], "axes": ["out", "in"]}


def list_names(config: dict[str, Any]) -> set[str]:
    return {scheme.format.name for scheme in find_schemes(config)}


def test_every_format_that_can_be_split_has_a_statement_that_names_it() -> None:
    stated = {sample.form.name for sample in list_format_samples()}
    assert stated == {form.name for form in list_formats() if not form.refuse}
    for sample in list_format_samples():
        assert sample.form.name in list_names({"quantization_config": sample.statement})


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": PACKED},
        {"text_config": {"quantization_config": PACKED}},
        {"compression_config": PACKED},
    ],
)
def test_a_statement_is_found_in_every_place(config: dict[str, Any]) -> None:
    (scheme,) = find_schemes(config)
    assert scheme.format.name == "pack-quantized"
    assert scheme.numbers == {"bits": 4, "group": 32}


def test_several_groups_are_several_schemes() -> None:
    groups = {
        "group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}},
        "group_1": {"weights": {"num_bits": 8, "type": "int", "group_size": None}},
    }
    schemes = find_schemes({"quantization_config": {**PACKED, "config_groups": groups}})
    assert [dict(scheme.numbers) for scheme in schemes] == [
        {"bits": 4, "group": 32},
        {"bits": 8, "group": None},
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}),
    ],
)
def test_a_file_beside_the_config_says_it_if_the_config_does_not(
    tmp_path: Path, name: str, text: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_text(json.dumps(text))
    assert (
        list_names(read_config(tmp_path))
        == {
            "hf_quant_config.json": {"modelopt-nvfp4"},
            "quantize_config.json": {"gptq-desc-act"},
        }[name]
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCKS}))
    assert "fp8-block" in list_names(read_config(tmp_path))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes: its blocks run on"),
        ({"quant_method": "torchao"}, "torchao: its tensors are Python objects"),
        ({"quant_method": "hqq"}, "no format describes a quantization of quant_method 'hqq'"),
        ({"bits": 4, "mode": "affine"}, "no format describes a quantization of bits 4"),
        ({**PACKED, "config_groups": {}}, "quantization_config has no bits (num_bits)"),
        ({"quant_method": ["fp8"]}, "no format describes"),
    ],
)
def test_what_no_format_describes_is_refused(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=r"config\.json: ") as caught:
        find_schemes({"quantization_config": stated})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"codes": CODES, "group": 3}, "unknown key 'group'"),
        ({"codes": {**CODES, "axes": ["rows"]}}, "axis 'rows'"),
        ({"codes": {**CODES, "dtypes": ["F9"]}}, "no dtype 'F9'"),
        ({"codes": {**CODES, "element": "int3"}}, "element 'int3'"),
        ({"codes": CODES, "when": {"quant_method": "fp8"}}, "when.quant_method must be a list"),
        ({"codes": CODES, "numbers": {"group": "x"}}, "numbers.group must be a list"),
        ({}, "codes must be a table"),
    ],
)
def test_a_format_file_is_read_strictly(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_format("test", table)
    assert message in str(caught.value)


EXPECTED = {
    "deepseek-r1": "fp8-block", "deepseek-v3.2-nvfp4": "modelopt-nvfp4",
    "deepseek-v4-flash-nvfp4": "modelopt-nvfp4", "glm-5-nvfp4": "modelopt-nvfp4",
    "granite-3.3-8b-fp8": "float-quantized", "kimi-k2.5": "pack-quantized",
    "kimi-k3": "mxfp4-pack-quantized", "laguna-s-2.1-fp8": "float-quantized",
    "llama-2-13b-chat-gptq": "gptq", "minimax-m3-mxfp8": "mxfp8",
    "minimax-m3-nvfp4": "modelopt-mxfp8", "gpt-oss-120b": "mxfp4",
    "nemotron-3.5-lightning-30b-a3b-nvfp4": "modelopt-fp8", "qwen3-32b-fp8-static": "modelopt-fp8",
    "qwen3.6-35b-a3b-nvfp4": "modelopt-nvfp4", "step-3.7-flash-fp8": "fp8-block",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_published_configs_are_understood(name: str) -> None:
    shared("fixtures")
    assert EXPECTED[name] in list_names(read_published_config(name))


def test_every_published_config_is_understood_or_refused_in_a_line() -> None:
    shared("fixtures")
    refused = {}
    for folder in sorted(PUBLISHED.glob("*/")):
        try:
            find_schemes(read_published_config(folder.name))
        except RecipeError as fault:
            refused[folder.name] = str(fault)
    assert refused.keys() == {"mistral-small-4-119b-mlx-4bit", "molmo-7b-nf4"}
