"""Touches new memory before it is read into: its first touch is most of what reading a file costs.

Linux gives a process its memory page by page, as it is first written. To have many pages at once
takes three quarters of the time, and huge pages a fifth; but if a virtual machine's host has to
find them first, huge pages take twice as long, and that may be so from some tensor on. So memory is
touched in chunks, each in pages of the kind that was faster last.
"""

import ctypes
import time
from dataclasses import dataclass, field

import torch

HUGE_PAGE = 2 << 20
CHUNK = 8 * HUGE_PAGE  # bytes that are touched at once, and timed
MADV_HUGEPAGE = 14  # linux/mman.h; madvise(2) fails if the kernel has no such pages
MADV_POPULATE_WRITE = 23  # since Linux 5.14; it fails on older ones

_madvise = getattr(ctypes.CDLL(None), "madvise", None)


@dataclass(slots=True)
class FirstTouch:
    """How memory is touched first, by how long it took before.

    Attributes:
        rates: The bytes a second of the last chunk in pages of the usual size (False), and of the
            last in huge ones (True).
    """

    rates: dict[bool, float] = field(default_factory=dict)

    def choose_huge(self) -> bool:
        """Whether the next chunk is to have huge pages: first not, then once, then if faster.

        Example:
            >>> FirstTouch({False: 3e9, True: 15e9}).choose_huge()
            True
        """
        if len(self.rates) < 2:
            return False in self.rates
        return self.rates[True] > self.rates[False]

    def touch_memory(self, tensor: torch.Tensor, touches_usual: bool = True) -> None:
        """Touch the whole huge pages of a contiguous new tensor on the CPU.

        No page outside of it is touched, so that no more memory is taken. What the kernel refuses
        is touched when it is written.

        Args:
            tensor: The tensor. What it holds stays.
            touches_usual: Whether pages of the usual size are touched now. If not, they are when
                they are written: by several threads at once, say, or while a disk is waited for.
        """
        start, stop = find_huge_pages(tensor)
        for at in range(start, stop, CHUNK):
            size = min(CHUNK, stop - at)
            is_huge = self.choose_huge()
            if is_huge:
                advise_kernel(at, size, MADV_HUGEPAGE)
            if touches_usual or is_huge or not self.rates:
                begin = time.perf_counter()
                is_touched = advise_kernel(at, size, MADV_POPULATE_WRITE)
                seconds = time.perf_counter() - begin
                self.rates[is_huge] = size / max(seconds, 1e-9) if is_touched else 0.0


def find_huge_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's memory is whole huge pages; equal if there are none.

    Example:
        >>> find_huge_pages(torch.empty(8 << 20, device="meta"))
        (0, 0)
    """
    if _madvise is None or tensor.device.type != "cpu":
        return 0, 0
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    return (start, stop) if start < stop else (0, 0)


def advise_kernel(start: int, size: int, advice: int) -> bool:
    """Tell the kernel something of memory of this process; whether it has taken the advice."""
    return _madvise is not None and not _madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(size), advice
    )
