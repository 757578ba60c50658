"""What shrinks on a rank beside the weights: attributes and buffers counted along a tensor."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardkit.errors import ManifestError
from shardkit.layout import STYLES
from shardkit.layout.spans import Section
from shardkit.planning import Layout, Mesh, Placement, Plan
from shardkit.recipe.recipe import ModuleAttribute
from shardkit.runtime.parallelize import _set_attribute, find_modules, keep_local_units
from shardkit.tensor import TensorSpec

# Six heads of width 4, and one group of 3 that all of them share: ranks hold 12 + 3 each.
SECTIONS = (Section(6, 4), Section(1, 3, shared_by=6))
SPEC = TensorSpec("layers.0.mixer.conv1d.weight", "F32", (27, 1, 4))
PLACED = {SPEC.name: Placement(SPEC, Layout(STYLES["column"], 0, SECTIONS))}


class Mixer(nn.Module):
    def __init__(self, conv_dim: int) -> None:
        super().__init__()
        self.conv_dim = conv_dim
        self.register_buffer("scales", torch.arange(27.0)[None], persistent=False)


def model_of(conv_dim: int = 27) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mixer": Mixer(conv_dim)})])})


def plan_of(*rules: ModuleAttribute) -> Plan:
    return Plan(Mesh(2), tuple(PLACED.values()), {}, rules)


def test_an_attribute_is_as_long_as_the_rank_s_part_of_its_tensor() -> None:
    rule, model = ModuleAttribute("layers.*.mixer", "conv_dim", "conv1d.weight"), model_of()
    _set_attribute(model, rule, plan_of(rule), PLACED, Mesh(2).rank(1))
    assert model.get_submodule("layers.0.mixer").conv_dim == 15


def test_a_buffer_is_cut_as_its_tensor_is() -> None:
    rule, model = ModuleAttribute("layers.*.mixer", "scales", "conv1d.weight"), model_of()
    _set_attribute(model, rule, plan_of(rule), PLACED, Mesh(2).rank(1))
    keep_local_units(model, plan_of(rule), PLACED, Mesh(2).rank(1))
    scales = model.get_submodule("layers.0.mixer").scales
    assert isinstance(scales, torch.Tensor)
    assert scales.tolist() == [[*range(12, 24), 24, 25, 26]]


@pytest.mark.parametrize(("length", "tensor"), [(26, "conv1d.weight"), (27, "conv2d.weight")])
def test_an_attribute_of_another_length_is_refused(length: int, tensor: str) -> None:
    rule, model = ModuleAttribute("layers.*.mixer", "conv_dim", tensor), model_of(length)
    with pytest.raises(ManifestError, match=rf"conv_dim: {length} is not a length of a {tensor}"):
        _set_attribute(model, rule, plan_of(rule), PLACED, Mesh(2).rank(0))


def test_a_module_without_the_tensor_keeps_its_attribute_where_it_may_lack_it() -> None:
    rule, model = ModuleAttribute("layers.*.mixer", "conv_dim?", "out_proj.weight"), model_of()
    _set_attribute(model, rule, plan_of(rule), PLACED, Mesh(2).rank(1))
    assert model.get_submodule("layers.0.mixer").conv_dim == 27


def decoder_of(model_type: str) -> nn.Module:
    model: Any = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList([Mixer(27)])})})
    model.config = SimpleNamespace(model_type=model_type)
    built: nn.Module = model
    return built


def test_a_part_that_only_other_classes_of_the_type_have_may_be_missing() -> None:
    assert not [*find_modules(decoder_of("bigbird_pegasus"), "encoder.layers.*.self_attn")]


@pytest.mark.parametrize(
    ("model_type", "pattern"),
    [
        ("bigbird_pegasus", "encodr.layers.*.self_attn"),
        ("bigbird_pegasus", "decoder.layers.*.self_atn"),
        ("no-such-type", "encoder.layers.*.self_attn"),
    ],
)
def test_a_misspelt_module_is_an_error(model_type: str, pattern: str) -> None:
    with pytest.raises(ManifestError, match="has no module"):
        [*find_modules(decoder_of(model_type), pattern)]
