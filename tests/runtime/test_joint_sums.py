"""Modules whose outputs are summed together: one all-reduce, and the outputs of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardkit import runtime
from shardkit.authoring.masked_sum import load_reference
from shardkit.errors import ManifestError
from shardkit.planning import Mesh, Plan
from shardkit.recipe import JointSum
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.join_sums import find_joints, join_sums
from shardkit.runtime.layers.joint_sum import separate_sums
from shardkit.runtime.layers.linear import make_row_parallel
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

PARALLEL = JointSum("layers.*", ("attn", "mlp.out"), "mlp.out")
AROUND = JointSum("layers.*", ("mlp.first", "mlp.second"), "mlp")
TOKENS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class TwoRanks(TensorParallelGroup):
    """A rank of two with the same weights and inputs: a sum is twice a rank's summand."""

    def __init__(self, tp_rank: int = 0) -> None:
        super().__init__(tp_rank, 2, torch.device("cpu"))

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        self.counts["all_reduce"] += 1
        return 2 * x


class Pair(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        output: torch.Tensor = self.first(x) * self.scale + self.second(x)
        return output, "scores"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.out(x)
        return output


class Layer(nn.Module):
    """Attention and MLP in parallel, in an order of its own."""

    def __init__(self, mlp_first: bool = False) -> None:
        super().__init__()
        self.attn, self.mlp, self.mlp_first = nn.Linear(4, 4), Mlp(), mlp_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = (self.mlp, self.attn) if self.mlp_first else (self.attn, self.mlp)
        first, second = (module(x) for module in modules)
        output: torch.Tensor = x + first + second
        return output


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Pair(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor
        output, scores = self.mlp(x)
        assert scores == "scores"
        return x + output


def stack(layer: nn.Module) -> Any:
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return nn.ModuleDict({"layers": nn.ModuleList([layer])})


def make_parallel(
    layer: nn.Module, rule: JointSum, tp_rank: int = 0, is_joint: bool = True
) -> tuple[Any, TwoRanks]:
    """A stack of one layer, its linear layers row-parallel, with one sum or two."""
    model, group = stack(layer), TwoRanks(tp_rank)
    for module in [each for each in model.modules() if isinstance(each, nn.Linear)]:
        make_row_parallel(module, group)
    if is_joint:
        join_sums(model, Plan(Mesh(2), (), {}, joint_sums=(rule,)), group)
    return model["layers"][0], group


@pytest.mark.parametrize(("make_layer", "rule"), [(Layer, PARALLEL), (Mixture, AROUND)])
def test_one_sum_gives_what_two_give(make_layer: Any, rule: JointSum) -> None:
    apart, two = make_parallel(make_layer(), rule, is_joint=False)
    together, one = make_parallel(make_layer(), rule)
    expected = apart(TOKENS)
    if rule is AROUND:  # on ranks alike a bias that rank 0 alone adds counts twice here
        mlp = apart.mlp
        expected += mlp.first.bias * mlp.scale + mlp.second.bias
    torch.testing.assert_close(together(TOKENS), expected)
    assert (two.counts["all_reduce"], one.counts["all_reduce"]) == (2, 1)


def test_a_bias_inside_of_what_is_summed_is_added_by_rank_0_alone() -> None:
    outputs = []
    for tp_rank in range(2):
        layer, _ = make_parallel(Mixture(), AROUND, tp_rank)
        outputs.append(layer(TOKENS) - TOKENS)
    mlp = layer.mlp
    bias = mlp.first.bias * mlp.scale + mlp.second.bias
    torch.testing.assert_close(outputs[0] - outputs[1], (2 * bias).expand_as(outputs[0]))


@pytest.mark.parametrize(("make_layer", "rule"), [(Layer, PARALLEL), (Mixture, AROUND)])
def test_each_module_sums_for_itself_if_they_are_compared(make_layer: Any, rule: JointSum) -> None:
    apart, _ = make_parallel(make_layer(), rule, is_joint=False)
    together, group = make_parallel(make_layer(), rule)
    with separate_sums(together.modules()):
        assert torch.equal(together(TOKENS), apart(TOKENS))
    assert group.counts["all_reduce"] == 2
    together(TOKENS)
    assert group.counts["all_reduce"] == 3


def test_a_model_that_runs_them_in_another_order_is_refused() -> None:
    layer, _ = make_parallel(Layer(mlp_first=True), PARALLEL)
    with pytest.raises(ManifestError, match=r"joint_sums: layers.0.attn has not run before"):
        layer(TOKENS)


def test_what_a_failed_pass_has_left_is_not_added_to_the_next() -> None:
    layer, _ = make_parallel(Layer(), PARALLEL)
    expected = layer(TOKENS)
    layer.attn(TOKENS + 1)  # as far as a pass came that failed
    assert torch.equal(layer(TOKENS), expected)


def test_a_place_that_the_model_lacks_is_refused() -> None:
    rule = JointSum("layers.*", ("mlp.first", "mlp.second"), "moe")
    with pytest.raises(ManifestError, match=r"joint_sums: layers.0 has no module 'moe'"):
        make_parallel(Mixture(), rule)


def test_one_summand_alone_is_left_as_it_is() -> None:
    model = stack(Mixture())
    make_row_parallel(model["layers"][0].mlp.second, TwoRanks())
    plan = Plan(Mesh(2), (), {}, joint_sums=(AROUND,))
    assert not [*find_joints(model, plan)]


@pytest.mark.parametrize("name", ["phi", "qwen2_moe"])
def test_the_outputs_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "whole")
    cut(source, tmp_path / "shards", 2)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        expected = load_reference(source)(ids).logits
    with runtime.launch(tmp_path / "shards") as engine:
        torch.testing.assert_close(engine.logits(ids[0].tolist()), expected, atol=1e-4, rtol=1e-4)
