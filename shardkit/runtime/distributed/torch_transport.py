"""How tensors travel between ranks: through torch.distributed, over gloo or NCCL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardkit.runtime.distributed.rounded_sums import add_rounded


class Transport(Protocol):
    """What carries the tensors of collectives, which every rank calls in the same order.

    Each raises RuntimeError if another rank is gone or late.
    """

    def sum_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's contiguous `x`, on every rank; it may be `x`, overwritten."""

    def sum_rounded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `sum_ranks`, of what `add_rounded` adds; ranks send each other a narrower dtype."""

    def gather_ranks(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's contiguous `x`, side by side in the last dimension; `sizes` are of that."""

    def copy_first(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's contiguous `x`, on every rank; it may be `x`, overwritten."""

    def close(self) -> None:
        """Give back what it holds."""


@dataclass(frozen=True, slots=True)
class TorchTransport:
    """The collectives of a process group of torch's."""

    process_group: dist.ProcessGroup | None

    def sum_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` has it, in place."""
        dist.all_reduce(x, group=self.process_group)
        return x

    def sum_rounded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `Transport` has it, in a new tensor.

        Two ranks send each other everything. More of them each add a part, and send the sum of it:
        so each sends as few numbers as a ring does (Rabenseifner 2004, reduce-scatter and gather).
        """
        flat, size = x.detach().view(-1), dist.get_world_size(self.process_group)
        if size == 2:
            return add_rounded(self._gather(flat.to(dtype), size), x.dtype).view(x.shape)
        part = -(-flat.numel() // size)
        sent = flat.new_zeros(part * size, dtype=dtype)
        sent[: flat.numel()] = flat
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.process_group)
        own = add_rounded(received.view(size, part).unbind(), x.dtype).to(dtype)
        total = torch.cat(self._gather(own, size))[: flat.numel()]
        return total.to(x.dtype).view(x.shape)

    def gather_ranks(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """As `Transport` has it: tensors of one shape travel, the shorter ones padded."""
        lacking = max(sizes) - x.shape[-1]
        parts = self._gather(F.pad(x, (0, lacking)) if lacking else x, len(sizes))
        return torch.cat([p[..., :size] for p, size in zip(parts, sizes, strict=True)], -1)

    def copy_first(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` has it, in place."""
        source = dist.get_global_rank(self.process_group, 0) if self.process_group else 0
        dist.broadcast(x, source, self.process_group)
        return x

    def close(self) -> None:
        """As `Transport` has it: the process group is its maker's to end."""

    def _gather(self, x: torch.Tensor, size: int) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x, group=self.process_group)
        return parts
