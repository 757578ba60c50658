"""A group's collectives as operators of torch's, which a compiled model calls.

torch.compile would otherwise look into a collective, and compile again for each count that it
keeps. An operator it leaves as it is, so a model is one graph with its collectives in it. On a GPU
that graph is divided at them: what waits for other ranks is in no CUDA graph, so that its time
limit holds.
"""

from collections.abc import Sequence
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch


class CollectiveGroup(Protocol):
    """What the operators need of a group of ranks."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, which may be overwritten."""

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's `x`, concatenated along the last dimension."""


_groups: WeakValueDictionary[int, CollectiveGroup] = WeakValueDictionary()
_numbers = count()
# A tag that torch has since 2.9; without it, what it is for is not used (see compile_decoding).
GRAPH_TAGS = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None]


def register_group(group: CollectiveGroup) -> int:
    """The number that operators know a group by, as long as it lives."""
    number = next(_numbers)
    _groups[number] = group
    return number


@torch.library.custom_op("shardkit::all_reduce", mutates_args=(), tags=GRAPH_TAGS)
def all_reduce_op(x: torch.Tensor, group: int) -> torch.Tensor:
    """The sum of every rank's `x`, in new memory, by the group of that number."""
    return _groups[group].all_reduce(x.clone(memory_format=torch.contiguous_format))


@all_reduce_op.register_fake
def _(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("shardkit::all_gather", mutates_args=(), tags=GRAPH_TAGS)
def all_gather_op(x: torch.Tensor, sizes: list[int], group: int) -> torch.Tensor:
    """The ranks' tensors, side by side in the last dimension, by the group of that number."""
    return _groups[group].all_gather(x, sizes)


@all_gather_op.register_fake
def _(x: torch.Tensor, sizes: list[int], group: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(sizes))
