"""What a split reads from: an unsharded checkpoint, or a shard folder read as one."""

from collections.abc import Sequence
from typing import Protocol

from shardkit.tensor import TensorSpec


class Source(Protocol):
    """Whole tensors, by name, readable from any byte."""

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in the order its bytes lie."""

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes from byte `offset` on."""
