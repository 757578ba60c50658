"""Modules that run whole on gathered inputs."""

from collections.abc import Sequence

import torch
from torch import nn

from shardkit.runtime.layers.norm import make_gathered

PARTS = [torch.tensor([0, 1, 4]), torch.tensor([2, 3])]  # what each of two ranks holds of five


class Gated(nn.Module):
    """Normed over all it is given, and gated."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = (x / x.double().norm()).to(x.dtype)
        return normed * gate


class TwoRanks:
    """What the other rank would send is known, since the whole inputs are."""

    device = torch.device("cpu")

    def __init__(self, tp_rank: int, *whole: torch.Tensor) -> None:
        self.tp_rank, self.whole, self.gathers = tp_rank, whole, 0

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self.gathers += 1
        sent = [torch.cat([w[..., part] for w in self.whole], -1) for part in PARTS]
        assert x.equal(sent[self.tp_rank])
        assert list(sizes) == [part.shape[-1] for part in sent]
        return torch.cat(sent, -1)


def test_a_norm_and_its_gate_take_one_gather() -> None:
    x, gate = torch.randn(2, 3, 5), torch.randn(2, 3, 5).bfloat16()
    whole = Gated()(x, gate)
    for tp_rank, held in enumerate(PARTS):
        module, group = Gated(), TwoRanks(tp_rank, x, gate)
        make_gathered(module, group, PARTS)  # type: ignore[arg-type]
        assert module(x[..., held], gate=gate[..., held]).equal(whole[..., held])
        assert group.gathers == 1
