"""Packs the quantized weights of a shard as they are read, and what a conversion makes of them.

A conversion stacks, concatenates, splits and transposes tensors. In a `RecordLayout` it does so
without computing the packed ones among them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shardkit.errors import UsageError
from shardkit.layout import Span, num_indices
from shardkit.planning import Plan, Rank
from shardkit.recipe.formats import QuantizedWeight
from shardkit.runtime.dequantize import StoredWeight, store_weight
from shardkit.runtime.packed import PackedTensor, pack_weight, record_operation

Dequantize = Literal["forward", "load"]
aten = torch.ops.aten
LAYOUTS = {
    aten.stack.default, aten.cat.default, aten.transpose.int, aten.t.default, aten.permute.default,
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.slice.Tensor, aten.select.int,
}  # fmt: skip
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The spans of one dimension that are computed of a weight whose blocks are stored whole."""

    dim: int
    spans: tuple[Span, ...]


def check_dequantize(value: str) -> None:
    """Raise UsageError for a value of `dequantize` that is none."""
    if value not in get_args(Dequantize):
        names = " or ".join(f'"{name}"' for name in get_args(Dequantize))
        raise UsageError(f"dequantize is {value!r}; it must be {names}")


def pack_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    weights_by_part: Mapping[str, QuantizedWeight],
    dtype: torch.dtype,
    excerpts: Mapping[str, Excerpt],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as they are read, each quantized weight packed once all that stores it is there.

    Args:
        tensors: Names on disk and tensors, in any order.
        weights_by_part: For each stored tensor that a weight is computed from, the weight.
        dtype: What weights are computed in.
        excerpts: What the rank computes of each weight that it does not compute all of.
    """
    incomplete: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if (weight := weights_by_part.get(name)) is None:
            yield name, tensor
            continue
        parts = incomplete.setdefault(weight.name, {})
        parts[name] = tensor
        if len(parts) == len(weight.operands):
            stored = store_weight(weight, incomplete.pop(weight.name))
            yield weight.name, pack_excerpt(stored, dtype, excerpts.get(weight.name))


def pack_excerpt(weight: StoredWeight, dtype: torch.dtype, excerpt: Excerpt | None) -> PackedTensor:
    """A weight that stays as it is stored, or what is computed of it."""
    packed = pack_weight(weight, dtype)
    if excerpt is None:
        return packed
    pieces = [_narrow(packed, excerpt.dim, start, stop) for start, stop in excerpt.spans]
    return (
        pieces[0] if len(pieces) == 1 else record_operation(aten.cat.default, pieces, excerpt.dim)
    )


def find_excerpts(plan: Plan, rank: Rank) -> dict[str, Excerpt]:
    """What a rank computes of the weights that share blocks with other ranks, by their names."""
    weights = {placement.spec.name: placement for placement in plan.weights}
    names = {codes: weight.name for codes, weight in plan.grouping.weights.items()}
    excerpts: dict[str, Excerpt] = {}
    for group in plan.groups:
        if group.layout.dim is None or group.layout.block_size == 1:
            continue
        covers = group.layout.cover(rank)
        spans = tuple(span for cover in covers for span in cover.wanted)
        if num_indices(spans) == sum(cover.stop - cover.start for cover in covers):
            continue
        for codes in filter(names.__contains__, group.tensors.names):
            name = names[codes]
            excerpts[name] = Excerpt(weights[name].dim or 0, spans)
    return excerpts


class RecordLayout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In a `with`, operations that rearrange packed tensors make packed ones, and compute nothing.

    Any other operation on them computes, as it does elsewhere.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record an operation, or run it."""
        kwargs = kwargs or {}
        if not any(isinstance(each, PackedTensor) for each in tree_iter((args, kwargs))):
            return func(*args, **kwargs)
        if func in SPLITS:
            return [_narrow(args[0], *place) for place in _list_pieces(*args, **kwargs)]
        return record_operation(func, *args, **kwargs) if func in LAYOUTS else func(*args, **kwargs)


def _narrow(packed: PackedTensor, dim: int, start: int, stop: int) -> PackedTensor:
    """Part of a packed tensor: of what is stored, if that is whole rows of blocks."""
    source = packed.source
    if isinstance(source, StoredWeight) and dim % packed.ndim == 0 and source.may_cut(start, stop):
        return pack_weight(source.narrow(start, stop), packed.dtype)
    return record_operation(aten.slice.Tensor, packed, dim, start, stop)


def _list_pieces(
    tensor: torch.Tensor, size: int | list[int], dim: int = 0
) -> Iterator[tuple[int, int, int]]:
    """The dimension, start and stop of each piece of a split."""
    length = tensor.shape[dim]
    sizes = size if isinstance(size, list) else [size] * -(-length // size)
    start = 0
    for each in sizes:
        yield dim, start, min(start + each, length)
        start += each
