"""Times the collectives of a group."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.torch_transport import Transport

T = TypeVar("T")


class TimedTransport:
    """Carries tensors as another transport does, and adds up the seconds, waits included.

    Only where a collective has ended when its call returns, which on a GPU it has not.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._seconds = 0.0

    @classmethod
    def install(cls, group: TensorParallelGroup) -> "TimedTransport | None":
        """Time a group's collectives from now on; None if they cannot be timed."""
        if group.device.type != "cpu":
            return None
        timed = cls(group.carrier)
        group.transport = timed
        return timed

    def take_seconds(self) -> float:
        """The seconds since it was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def sum_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` says."""
        return self._time(lambda: self._transport.sum_ranks(x))

    def sum_rounded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `Transport` says."""
        return self._time(lambda: self._transport.sum_rounded(x, dtype))

    def gather_ranks(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """As `Transport` says."""
        return self._time(lambda: self._transport.gather_ranks(x, sizes))

    def copy_first(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` says."""
        return self._time(lambda: self._transport.copy_first(x))

    def close(self) -> None:
        """As `Transport` says."""
        self._transport.close()

    def _time(self, collective: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = collective()
        self._seconds += time.perf_counter() - started
        return result
