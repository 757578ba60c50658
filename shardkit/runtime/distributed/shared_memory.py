"""Collectives over memory that the ranks of one host share: a few microseconds, without a kernel.

Each rank has a line of its own in a header, and two slots for data. In each exchange a rank writes
its tensor into one of its slots, then the number of the exchange into its line, waits until every
other line has that number, and reads the others' slots. Slots alternate: a rank writes into one
again two exchanges later, and before that it has waited for the next number of every rank, each of
which has then read the slot. So one number for each rank is all that is needed.

That a rank which sees the number sees the data, too, relies on x86: stores of one processor become
visible in their order, and loads are done in theirs (Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 3A, 8.2.2; Sewell et al. 2010, x86-TSO). Other processors do not promise
it, and Python has no fences, so they use gloo.

The memory has no name: the kernel frees it with its last process, however that ends.
"""

import math
import mmap
import os
import platform
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from shardkit.runtime.distributed.rounded_sums import add_rounded

LINE = 16  # 8-byte words of a rank's line, so that no two lines share a block of the cache
ARRIVED, CALLS, CLOSED = 0, 1, 3  # words: the exchange, what is exchanged in each slot, the end
SLOT_BYTES = 1 << 20
TOKEN_BYTES = 16
MAX_VIEWS = 256  # shapes whose slots are kept as tensors
PROCESSORS = ("x86_64", "AMD64")
SUM, GATHER, COPY = 1, 2, 3

SPINS = 2000  # looks without giving way, of about 0.1 us each
YIELDS = 2000  # looks that let another process run
PAUSE, LONGEST_PAUSE = 5e-5, 1e-3  # seconds between looks after that


def explain_absence() -> str:
    """Why this machine cannot have it; "" if it can."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return "needs Linux 5.3"
    if platform.machine() not in PROCESSORS:
        return f"relies on the memory ordering of x86, and this is {platform.machine()}"
    return ""


def measure_memory(size: int) -> int:
    """The bytes that `size` ranks share."""
    return _find_data(size) + 2 * size * SLOT_BYTES


def create_memory(size: int, token: bytes) -> int:
    """The file descriptor of new memory for `size` ranks, which begins with a token."""
    fd = os.memfd_create("shardkit-ranks", os.MFD_CLOEXEC)
    os.ftruncate(fd, measure_memory(size))
    os.pwrite(fd, token, LINE * 8 * size)
    return fd


def open_memory(pid: int, fd: int, size: int, token: bytes) -> mmap.mmap:
    """The memory that another process has created. Raises OSError if it is not there."""
    own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(own, TOKEN_BYTES, LINE * 8 * size) != token:
            raise FileNotFoundError(f"process {pid} is of another host")
        return mmap.mmap(own, measure_memory(size))
    finally:
        os.close(own)


class SharedMemoryTransport:
    """One rank's side of the memory that ranks share. It carries CPU tensors.

    Example:
        >>> transport.sum_ranks(torch.ones(3))  # doctest: +SKIP
        tensor([2., 2., 2.])
    """

    def __init__(self, memory: mmap.mmap, rank: int, pids: Sequence[int], limit: float) -> None:
        """Watch the other ranks' processes; `limit` is the seconds to wait for one."""
        self._memory, self._rank, self._size, self._limit = memory, rank, len(pids), limit
        self._words = memoryview(memory)[: LINE * 8 * self._size].cast("Q")
        self._others = [other for other in range(self._size) if other != rank]
        self._processes = {other: os.pidfd_open(pids[other]) for other in self._others}
        self._turn = 0
        self._slots: dict[tuple[torch.dtype, int], tuple[list[torch.Tensor], ...]] = {}

    def sum_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` has it: in a new tensor, added in the order of ranks on every rank."""
        flat = x.detach().view(-1)
        if 0 < flat.nbytes <= SLOT_BYTES:
            return _add(self._exchange(SUM, flat, flat.dtype, flat.numel())).view(x.shape)
        total = torch.empty_like(flat)
        for piece, out in zip(_cut(flat), _cut(total), strict=True):
            _add(self._exchange(SUM, piece, piece.dtype, piece.numel()), out)
        return total.view(x.shape)

    def sum_rounded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `Transport` has it: in a new tensor."""
        flat = x.detach().view(-1)
        total = torch.empty_like(flat)
        for piece, out in zip(_cut(flat, dtype), _cut(total, dtype), strict=True):
            add_rounded(self._exchange(SUM, piece, dtype, piece.numel()), x.dtype, out)
        return total.view(x.shape)

    def gather_ranks(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """As `Transport` has it: each rank's part is copied into its slot, and from there once."""
        rows, widest = math.prod(x.shape[:-1]), max(sizes)
        own, total = x.detach().view(rows, x.shape[-1]), x.new_empty(rows, sum(sizes))
        parts = torch.split(total, list(sizes), -1)
        for area in _cut_area(rows, widest, SLOT_BYTES // x.element_size()):
            count = math.prod(edge.stop - edge.start for edge in area)
            slots = self._exchange(GATHER, own[area], x.dtype, count)
            for part, slot in zip(parts, slots, strict=True):
                piece = part[area]
                piece.copy_(slot[: piece.numel()].view(piece.shape))
        return total.view(*x.shape[:-1], sum(sizes))

    def copy_first(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` has it, in place."""
        for piece in _cut(x.detach().view(-1)):
            given = None if self._rank else piece
            slots = self._exchange(COPY, given, piece.dtype, piece.numel())
            if self._rank:
                piece.copy_(slots[0])
        return x

    def close(self) -> None:
        """Tell the others that this rank exchanges nothing more."""
        self._words[LINE * self._rank + CLOSED] = 1
        for process in self._processes.values():
            with suppress(OSError):
                os.close(process)
        self._processes = {}

    def _exchange(
        self, call: int, piece: torch.Tensor | None, dtype: torch.dtype, count: int
    ) -> list[torch.Tensor]:
        """Every rank's slot with its piece, to be read before the next exchange but one.

        A rank's own is converted to `dtype` as it is copied there. It may have fewer numbers than
        the `count` that is the same for all, or be none.

        Raises RuntimeError if a rank is gone, late, or exchanges something else.
        """
        self._turn += 1
        half, words, own = self._turn & 1, self._words, LINE * self._rank
        slots = self._find_slots(dtype, count)[half]
        slot = slots[self._rank]
        if piece is not None:
            room = slot if piece.ndim == 1 else slot[: piece.numel()].view(piece.shape)
            room.copy_(piece)
        what = call << 56 | slot.element_size() << 48 | slot.nbytes
        words[own + CALLS + half] = what
        words[own + ARRIVED] = self._turn
        for other in self._others:
            if words[LINE * other + ARRIVED] < self._turn:
                self._wait_for(other)
            if words[LINE * other + CALLS + half] != what:
                raise RuntimeError(f"rank {other} exchanges other tensors in this collective")
        return slots

    def _wait_for(self, other: int) -> None:
        words, turn, at = self._words, self._turn, LINE * other + ARRIVED
        for _ in range(SPINS):
            if words[at] >= turn:
                return
        for _ in range(YIELDS):
            os.sched_yield()
            if words[at] >= turn:
                return
        end, pause = time.monotonic() + self._limit, PAUSE
        while words[at] < turn:
            if self._is_gone(other) and words[at] < turn:  # it may have arrived just before
                raise RuntimeError(f"rank {other} has closed the memory that ranks share")
            if time.monotonic() > end:
                raise RuntimeError(f"rank {other} did not come within {self._limit:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_gone(self, other: int) -> bool:
        """Whether a rank has closed its side, or its process has ended."""
        if self._words[LINE * other + CLOSED]:
            return True
        process = self._processes.get(other)
        if process is None:
            return True
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(0))

    def _find_slots(self, dtype: torch.dtype, count: int) -> tuple[list[torch.Tensor], ...]:
        """Views of every rank's two slots as tensors."""
        if (slots := self._slots.get((dtype, count))) is None:
            if len(self._slots) == MAX_VIEWS:
                self._slots.clear()
            with torch.inference_mode(False):  # such tensors may be written to outside of it, too
                slots = tuple(
                    [self._view_slot(half, rank, dtype, count) for rank in range(self._size)]
                    for half in range(2)
                )
            self._slots[dtype, count] = slots
        return slots

    def _view_slot(self, half: int, rank: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        offset = _find_data(self._size) + (half * self._size + rank) * SLOT_BYTES
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)


def _find_data(size: int) -> int:
    """Where the slots begin, after the lines and the token: at a page."""
    return -(-(LINE * 8 * size + TOKEN_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def _cut(flat: torch.Tensor, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
    """The pieces of a tensor that fit into slots, in its own dtype or another."""
    count = SLOT_BYTES // (dtype or flat.dtype).itemsize
    for start in range(0, flat.numel(), count):
        yield flat[start : start + count]


def _cut_area(rows: int, columns: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Areas of at most `count` numbers: whole rows, unless one has more."""
    wide = min(columns, count)
    tall = count // wide if wide else 1
    for top in range(0, rows, tall):
        for left in range(0, columns, wide or 1):
            yield slice(top, min(top + tall, rows)), slice(left, min(left + wide, columns))


def _add(parts: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    total = torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        total.add_(part)
    return total
