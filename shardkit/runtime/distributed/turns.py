"""Ranks that take turns: all ranks of a group in one process, without sockets.

Each rank has a thread, and only one runs at a time: until a collective, where it hands over to the
next. The last to arrive completes the collective. So any tp_size runs on one machine.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from shardkit.errors import RanksError, RanksLost, first_line
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.rounded_sums import add_rounded, is_wider

T = TypeVar("T")

MAX_SEGMENT = 1 << 20  # bytes of a segment of gloo's ring, at most
MIN_SEGMENTS = 2  # of each rank's part of the ring


class TurnsEnded(RanksError):
    """Another rank has failed, so this one cannot go on."""


class Turns:
    """Runs tasks that exchange values, one after another on a thread each, in order.

    What torch keeps for the whole process, the default dtype and the random state, each task has
    for itself.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._reset()

    def _reset(self) -> None:
        """Forget what an earlier run has left, such as one that failed."""
        self._deposits: dict[int, tuple[str, Any]] = {}
        self._results: dict[int, Any] = {}
        self._ended: set[int] = set()
        self._fault: tuple[int, BaseException] | None = None
        self._wake = [threading.Semaphore(0) for _ in range(self.size)]

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run one task for each index, and return what they return.

        Raises:
            RanksLost: A task had no memory.
            RanksError: A task failed, with its index and in one line; or one ended while others
                waited for it in an exchange. The error that it raised is the cause.
        """
        self._reset()
        outcomes: dict[int, T] = {}
        start = _ThreadState.save()

        def work(index: int) -> None:
            self._wake[index].acquire()
            start.restore()
            try:
                if self._fault is None:
                    outcomes[index] = tasks[index]()
            except BaseException as fault:
                self._fail(index, fault)
            self._end(index)

        threads = [
            threading.Thread(target=work, args=(index,), name=f"shardkit-turn-{index}")
            for index in range(self.size)
        ]
        for thread in threads:
            thread.start()
        self._wake[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as fault:  # an interrupt: every task ends at its next exchange
            self._fail(-1, fault)
            for thread in threads:
                thread.join()
            raise
        finally:
            start.restore()
        self._raise_fault()
        return [outcomes[index] for index in range(self.size)]

    def exchange(
        self, index: int, what: str, value: T, combine: Callable[[list[T]], Sequence[Any]]
    ) -> Any:
        """Wait until every task has come to the same exchange; `combine` gives each its result.

        Args:
            index: Whose value it is.
            what: The exchange in words, in which all must be the same.
            value: What this task brings.
            combine: Takes every task's value, in order, and returns a result for each; it is run
                once.

        Raises:
            TurnsEnded: Another task failed, has ended, or came to another exchange.
        """
        self._deposits[index] = what, value
        if len(self._deposits) == self.size:
            self._complete(combine)
        state = _ThreadState.save()
        self._hand_over(index)
        self._wake[index].acquire()
        state.restore()
        if self._fault is not None:
            raise TurnsEnded(f"rank {self._fault[0]} failed: {first_line(self._fault[1])}")
        return self._results.pop(index)

    def wait(self, index: int, what: str) -> None:
        """Wait until every task has come here. Raises TurnsEnded."""
        self.exchange(index, what, None, lambda values: values)

    def _complete(self, combine: Callable[[list[Any]], Sequence[Any]]) -> None:
        names = {index: what for index, (what, _) in self._deposits.items()}
        different = next((index for index in names if names[index] != names[0]), None)
        if different is not None:
            text = f"is in {names[different]}, but rank 0 in {names[0]}"
            self._fail(different, RanksError(text))
            return
        values = [self._deposits[index][1] for index in range(self.size)]
        self._deposits.clear()
        self._results = dict(enumerate(combine(values)))

    def _hand_over(self, index: int) -> None:
        """Wake the next task that does not wait for an exchange, in order of their numbers."""
        order = [*range(index + 1, self.size), *range(index + 1)]
        ready = [i for i in order if i not in self._deposits and i not in self._ended]
        if ready:
            self._wake[min(ready) if self._results else ready[0]].release()
        elif self._deposits and self._fault is None:
            waiting, (what, _) = next(iter(self._deposits.items()))
            ended = min(self._ended)
            self._fail(ended, RanksError(f"ended, but rank {waiting} waits for it in {what}"))

    def _fail(self, index: int, fault: BaseException) -> None:
        """Keep the first fault, and wake everyone, so that all end."""
        if self._fault is None:
            self._fault = index, fault
            for semaphore in self._wake:
                semaphore.release()

    def _end(self, index: int) -> None:
        self._ended.add(index)
        if self._fault is None:
            self._hand_over(index)

    def _raise_fault(self) -> None:
        if self._fault is None:
            return
        index, fault = self._fault
        if not isinstance(fault, Exception):
            raise fault
        if is_memory_error(fault):
            raise RanksLost(
                f"rank {index}: no memory is free: {first_line(fault)}; free some, or allow more"
            ) from fault
        kind = "" if isinstance(fault, RanksError) else f"{type(fault).__name__}: "
        raise RanksError(f"rank {index}: {kind}{first_line(fault, 1000)}") from fault


def is_memory_error(fault: BaseException) -> bool:
    """Whether it says that no memory is free; that of torch's allocator is a RuntimeError."""
    return isinstance(fault, MemoryError) or "allocate memory" in str(fault)


@dataclass(frozen=True, slots=True)
class _ThreadState:
    """What torch keeps once for the process, and each rank must have for itself."""

    dtype: torch.dtype
    rng: torch.Tensor

    @classmethod
    def save(cls) -> "_ThreadState":
        return cls(torch.get_default_dtype(), torch.get_rng_state())

    def restore(self) -> None:
        torch.set_default_dtype(self.dtype)
        torch.set_rng_state(self.rng)


@dataclass
class TurnGroup(TensorParallelGroup):
    """A rank of a group whose ranks take turns on the CPU.

    Sums have the bits that gloo's ring gives on real ranks, the order of its additions included;
    rounded ones those that every transport gives; and the other collectives only copy.

    Attributes:
        turns: What runs the ranks.
    """

    turns: Turns = field(default_factory=lambda: Turns(1))

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """The sum of every rank's `x`, written over it. Raises RanksError."""
        self.counts["all_reduce"] += 1
        if self.tp_size == 1:
            return x
        x = x.contiguous()

        def add(parts: list[torch.Tensor]) -> list[torch.Tensor]:
            if sent_as is None or not is_wider(x.dtype, sent_as):
                return [add_in_ring(parts)] * self.tp_size
            return [add_rounded([p.to(sent_as) for p in parts], x.dtype)] * self.tp_size

        self._exchange_tensors("all_reduce", x, add)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, written over it. Raises RanksError."""
        if self.tp_size > 1:
            self._exchange_tensors("broadcast", x, lambda p: [p[0].clone()] * self.tp_size)
        return x

    def _exchange_tensors(
        self,
        name: str,
        x: torch.Tensor,
        combine: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    ) -> None:
        self.num_collectives += 1
        what = f"{name} #{self.num_collectives} of {x.dtype} {list(x.shape)}"
        x.copy_(self.turns.exchange(self.tp_rank, what, x, combine))

    def _concatenate(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self.num_collectives += 1
        shape = [*x.shape[:-1], *sizes]
        what = f"all_gather #{self.num_collectives} of {x.dtype} {shape}"
        parts: list[torch.Tensor] = self.turns.exchange(
            self.tp_rank, what, x, lambda parts: [parts] * self.tp_size
        )
        return torch.cat(parts, -1)


def add_in_ring(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' tensors of one shape, added in the order of gloo's ring.

    The tensor is cut into one chunk for each rank, of whole segments. Chunk c travels from rank
    c - 1 down to rank c, and each rank adds its own to what comes (gloo, allreduce.cc, `ring`).
    """
    size, flat = len(parts), [part.reshape(-1) for part in parts]
    count, width = flat[0].numel(), flat[0].element_size()
    most = max(1, MAX_SEGMENT // width) * width
    segments = max(_divide_up(count * width, most), MIN_SEGMENTS * size)
    per_rank = _divide_up(segments, size)
    segment = _divide_up(_divide_up(count * width, per_rank * size), width)
    chunk = per_rank * segment
    total = torch.empty_like(flat[0])
    for at in range(size):
        piece = slice(at * chunk, min((at + 1) * chunk, count))
        partial = flat[at - 1][piece]
        for step in range(2, size + 1):
            partial = flat[(at - step) % size][piece] + partial
        total[piece] = partial
    return total.reshape(parts[0].shape)


def _divide_up(value: int, by: int) -> int:
    return (value + by - 1) // by
