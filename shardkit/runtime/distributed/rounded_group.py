"""The group as the layers of a model see it whose sums are sent in a narrower dtype."""

from collections.abc import Sequence

import torch

from shardkit.runtime.distributed.group import TensorParallelGroup


class RoundedGroup(TensorParallelGroup):
    """A group that rounds the summands of one model; another model may share the ranks.

    Concatenations stay as they are: rounded logits would tie where the others do not, and what a
    recurrent layer gathers is its state.
    """

    def __init__(self, group: TensorParallelGroup, reduce_dtype: torch.dtype) -> None:
        """See `group` with sums that are sent in `reduce_dtype`."""
        super().__init__(group.tp_rank, group.tp_size, group.device, counts=group.counts)
        self._group, self._reduce_dtype = group, reduce_dtype

    @property
    def exact(self) -> TensorParallelGroup:
        """The group itself, for sums of which every bit counts."""
        return self._group

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """As `TensorParallelGroup` has it, sent in this model's `reduce_dtype`."""
        return self._group.all_reduce(x, sent_as or self._reduce_dtype)

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """As `TensorParallelGroup` has it."""
        return self._group.all_gather(x, sizes)


def round_sums(group: TensorParallelGroup, reduce_dtype: torch.dtype | None) -> TensorParallelGroup:
    """A group that sends sums in a dtype; None leaves it as it is."""
    return group if reduce_dtype is None else RoundedGroup(group, reduce_dtype)
