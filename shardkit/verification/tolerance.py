"""How far two outputs differ, and how far they may: arithmetic only.

The tolerance is not a chosen number. The unsharded model's own rounding error, its distance in its
own dtype from the same model in a wider dtype, is measured on the same inputs. The sharded model
may be a small multiple of that away from the wider one, because it rounds as often and sums in
another order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FACTOR = 4.0  # multiples of the unsharded model's own rounding error
FEW_VALUES = 32  # so few may be rounded well by chance
FEW_ROWS = 4  # one row of so many may be routed elsewhere by rounding


@dataclass(frozen=True, slots=True)
class Error:
    """The largest and the root-mean-square distance from a reference."""

    max: float
    rms: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A sharded output's error, the unsharded one's, and the allowed one."""

    sharded: Error
    unsharded: Error
    allowed: Error

    @property
    def ok(self) -> bool:
        """Whether the sharded error is within the allowed one; NaN is not."""
        return self.sharded.max <= self.allowed.max and self.sharded.rms <= self.allowed.rms

    @property
    def excess(self) -> float:
        """The sharded error as a multiple of the allowed one, the worse of maximum and rms."""
        pairs = (self.sharded.max, self.allowed.max), (self.sharded.rms, self.allowed.rms)
        return max(
            error / allowed if allowed else torch.inf if error else 0.0 for error, allowed in pairs
        )


def measure_error(values: torch.Tensor, reference: torch.Tensor) -> Error:
    """The distance of two tensors of one shape, infinite if only one of two values is finite.

    What each has in the place of an infinite number, the largest of its dtype, is equal.
    """
    if not values.numel():
        return Error(0.0, 0.0)
    difference = (values.double() - reference.double()).abs()
    if not difference.max() < torch.finfo(values.dtype).max:
        is_equal = values.double() == reference.double()
        is_equal |= (find_extremes(values) * find_extremes(reference)) > 0
        difference = torch.where(is_equal, 0.0, difference)
        difference = difference.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Error(float(difference.max()), float(difference.square().mean().sqrt()))


def set_rows_aside(
    values: torch.Tensor, reference: torch.Tensor, allowed: Error
) -> tuple[Error, int]:
    """The error without the rows that are too far off, if they are few; and how many those are.

    A router in 16 bits may send a token to other experts on one side alone, by rounding. That token
    is far off, and the others are not; a wrong layout moves all of them.

    Args:
        values: An output `[..., N]`.
        reference: The reference's.
        allowed: The error that is allowed.

    Returns:
        The error of all rows and 0, if without the worst of each FEW_ROWS it is still too large; of
        fewer rows, one may be set aside if there is another.

    Example:
        >>> rows = torch.zeros(8, 2)
        >>> set_rows_aside(rows.index_fill(0, torch.tensor([3]), 9.0), rows, Error(1.0, 1.0))
        (Error(max=0.0, rms=0.0), 1)
    """
    error = measure_error(values, reference)
    width = values.shape[-1] if values.ndim > 1 else 1
    rows = [tensor.reshape(-1, max(width, 1)).double() for tensor in (values, reference)]
    distances = (rows[0] - rows[1]).abs().nan_to_num(nan=torch.inf).amax(-1)
    order = distances.argsort()  # the worst last
    most_aside = max(len(order) // FEW_ROWS, min(len(order) - 1, 1))
    for count in range(most_aside + 1):
        kept = order[: len(order) - count]
        most = measure_error(rows[0][kept], rows[1][kept])
        if most.max <= allowed.max and most.rms <= allowed.rms:
            return most, count
    return error, 0


def compare_outputs(
    sharded: torch.Tensor,
    unsharded: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    rounding: float = 0.0,
) -> Comparison:
    """Is the sharded output as near the reference as the unsharded one's rounding explains?

    Args:
        sharded: The output of the sharded model.
        unsharded: The output of the unsharded model in the same dtype, of the same shape.
        reference: The output of the unsharded model in a wider dtype.
        dtype: What both computed in. Errors below half a unit in the last place of values of this
            size mean nothing.
        rounding: Neither do errors below this share of the reference's size.
    """
    error, size = measure_error(unsharded, reference), measure_size(reference)
    allowed = allow_error(error, size, dtype, rounding)
    return Comparison(measure_error(sharded, reference), error, allowed)


def allow_error(error: Error, size: Error, dtype: torch.dtype, rounding: float = 0.0) -> Error:
    """The error that is allowed where the unsharded model has this one, of values of this size."""
    floor = max(0.5 * torch.finfo(dtype).eps, rounding)
    return Error(
        FACTOR * max(error.max, floor * size.max), FACTOR * max(error.rms, floor * size.rms)
    )


def worst_output(
    sharded: Mapping[str, torch.Tensor],
    unsharded: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> tuple[str, Comparison]:
    """The one of a model's outputs whose error is the largest multiple of the allowed one.

    An output of few values may be rounded by as much, relative to its size, as the others are: four
    numbers can come out nearly exact by chance. Raises KeyError if an output is missing.
    """
    rounding = max(
        (
            measure_error(unsharded[name], values).max / (measure_size(values).max or 1.0)
            for name, values in reference.items()
            if values.numel() >= FEW_VALUES
        ),
        default=0.0,
    )
    comparisons = {
        name: compare_outputs(
            sharded[name],
            unsharded[name],
            values,
            dtype,
            rounding if values.numel() < FEW_VALUES else 0.0,
        )
        for name, values in reference.items()
    }
    name = max(comparisons, key=lambda name: comparisons[name].excess)
    return name, comparisons[name]


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of predicted distributions `[..., V]`, in nats."""
    predicted = logits.double().log_softmax(-1)
    expected = reference.double().log_softmax(-1)
    return float((expected.exp() * (expected - predicted)).sum(-1).mean())


def top1_agreement(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The fraction of positions of `[..., V]` whose most likely token is the same."""
    return float((logits.argmax(-1) == reference.argmax(-1)).double().mean())


def measure_size(values: torch.Tensor) -> Error:
    """The largest and the root-mean-square value; what stands for an infinite one is left out."""
    zeros = torch.zeros_like(values)
    return measure_error(values.where(find_extremes(values) == 0, zeros), zeros)


def find_extremes(values: torch.Tensor) -> torch.Tensor:
    """1 or -1 for a value that is infinite or its dtype's largest: no score, but a mask; else 0."""
    return values.sign() * (values.abs() >= torch.finfo(values.dtype).max)
