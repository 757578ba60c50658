"""How far apart two outputs are, and how far apart they may be: arithmetic only.

The tolerance is not a chosen number.  The unsharded model's own rounding error, its distance in its
own dtype from the same model in a wider one, is measured on the same inputs; the sharded model may
be a small multiple of that away from the wider one, since it rounds as often and sums in another
order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FACTOR = 4.0  # multiples of the unsharded model's own rounding error
FEW = 32  # values: so few may be rounded well by chance


@dataclass(frozen=True, slots=True)
class Error:
    """The largest and the root-mean-square distance from a reference."""

    max: float
    rms: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """A sharded output's error, the unsharded one's, and what was allowed."""

    sharded: Error
    unsharded: Error
    allowed: Error

    @property
    def good(self) -> bool:
        """Whether the sharded error is within what is allowed; NaN is not."""
        return self.sharded.max <= self.allowed.max and self.sharded.rms <= self.allowed.rms

    @property
    def excess(self) -> float:
        """The sharded error as a multiple of what is allowed, the worse of the two."""
        pairs = (self.sharded.max, self.allowed.max), (self.sharded.rms, self.allowed.rms)
        return max(ours / most if most else torch.inf if ours else 0.0 for ours, most in pairs)


def error(found: torch.Tensor, reference: torch.Tensor) -> Error:
    """The distance of two tensors, infinite where one is not finite and the other is."""
    difference = found.double() - reference.double()
    difference = torch.where(found.double() == reference.double(), 0.0, difference).abs()
    difference = difference.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not difference.numel():
        return Error(0.0, 0.0)
    return Error(float(difference.max()), float(difference.square().mean().sqrt()))


def judge(
    sharded: torch.Tensor,
    unsharded: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    rounding: float = 0.0,
) -> Judgement:
    """Is the sharded output as near the reference as the unsharded one's rounding explains?

    Errors below half a unit in the last place of the values' own size say nothing, nor do those
    below `rounding`, relative to it.
    """
    own = error(unsharded, reference)
    size = _size(reference)
    half = max(0.5 * torch.finfo(dtype).eps, rounding)
    allowed = Error(FACTOR * max(own.max, half * size.max), FACTOR * max(own.rms, half * size.rms))
    return Judgement(error(sharded, reference), own, allowed)


def worst(
    sharded: Mapping[str, torch.Tensor],
    unsharded: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> tuple[str, Judgement]:
    """Of a model's outputs, the one that is furthest from what is allowed.

    One of few values may be rounded by as much, relative to its size, as the others are: four
    numbers can come out nearly exact by chance.  Raises KeyError for an output that is missing.
    """
    rounding = max(
        (error(unsharded[name], t).max / (_size(t).max or 1.0) for name, t in reference.items()
         if t.numel() >= FEW),
        default=0.0,
    )  # fmt: skip
    found = {
        name: judge(sharded[name], unsharded[name], t, dtype, rounding if t.numel() < FEW else 0.0)
        for name, t in reference.items()
    }
    name = max(found, key=lambda name: found[name].excess)
    return name, found[name]


def _size(values: torch.Tensor) -> Error:
    return error(values, torch.zeros_like(values))


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of predicted distributions, in nats."""
    mine = logits.double().log_softmax(-1)
    truth = reference.double().log_softmax(-1)
    return float((truth.exp() * (truth - mine)).sum(-1).mean())


def agreement(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The fraction of positions whose most likely token is the same."""
    return float((logits.argmax(-1) == reference.argmax(-1)).double().mean())
