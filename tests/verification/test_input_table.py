"""Inputs stated as data: tensors, the arithmetic of their sizes, and placeholders in the text."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardkit.authoring.samples import list_samples
from shardkit.errors import RecipeError
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.input_table import InputTable, Placeholders

CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=32, sizes=[4, 8]), image_id=9)
SIZES = {"batch": 2, "length": 24}


def make(entry: Any) -> torch.Tensor:
    return InputTable("any", {"x": entry}, []).make_tensors(SIZES, CONFIG)["x"]


def test_lengths_are_numbers_fields_and_arithmetic() -> None:
    tensor = make(["batch", "vision_config.image_size // vision_config.sizes[0] - 1", 3])
    assert (tensor.shape, tensor.dtype) == ((2, 7, 3), torch.float32)
    assert torch.equal(tensor, make(["batch", 7, 3])), "the same every time"
    assert tensor.std() > 0.5


def test_a_value_fills_a_tensor_and_values_are_as_given() -> None:
    assert torch.equal(
        make({"shape": ["batch", 1], "value": 1}), torch.ones(2, 1, dtype=torch.int64)
    )
    assert make({"shape": [1], "value": True}).dtype == torch.bool
    assert torch.equal(make({"values": [[1, "image_id + 1"]]}), torch.tensor([[1, 10]]))


def test_an_argument_may_be_left_out() -> None:
    table = InputTable("any", {"x": "none", "y": [1]}, [])
    assert table.exclusions == {"x"}
    assert table.make_tensors(SIZES, CONFIG).keys() == {"y"}


def test_placeholders_are_counted() -> None:
    entries: list[dict[str, Any]] = [
        {"token": "image_id", "count": "2 * batch"},
        {"token": 7, "count": 1, "kind": 0},
    ]
    table = InputTable("any", {}, entries)
    assert table.list_placeholders(SIZES, CONFIG) == [Placeholders(9, 4), Placeholders(7, 1, 0)]


@pytest.mark.parametrize(
    "text", ["no_field", "image_id / 2", "f(1)", "vision_config.sizes[5]", "1 +"]
)
def test_an_expression_without_a_value_is_an_error_of_one_line(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^inputs\.toml: any: .* has no value for this config$"):
        make([text])


def test_parts_are_joined_along_the_last_axis() -> None:
    tensor = make({"join": [{"shape": ["batch", 3, 2], "value": 1.0}, ["batch", 3, 4]]})
    assert tensor.shape == (2, 3, 6)
    assert torch.equal(tensor[..., :2], torch.ones(2, 3, 2))
    assert tensor[..., 2:].std() > 0.5


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("speech_to_text", {"input_features": (2, 32, 8), "decoder_input_ids": (2, 12)}),
        ("pop2piano", {"input_features": (2, 12, 64), "decoder_input_ids": (2, 12)}),
        (
            "voxtral",
            {"input_features": (2, 8, 24), "input_ids": (2, 30), "attention_mask": (2, 30)},
        ),
    ],
)
def test_a_model_gets_what_is_stated_and_what_follows_from_its_config(
    name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    sample = next(sample for sample in list_samples() if sample.name == name)
    model = sample.model_class(sample.make_config())
    assert {name: (*tensor.shape,) for name, tensor in make_inputs(model).items()} == shapes
