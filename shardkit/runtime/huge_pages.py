"""Asks Linux for huge pages: first touch of large memory is most of what reading into it costs.

With them, first touch takes half the time where the memory is there, and four times as long on a
virtual machine whose host has to find it first. So what reads tries both, and keeps to the faster.
"""

import ctypes
from dataclasses import dataclass, field

import torch

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14  # linux/mman.h; glibc's madvise(2) fails if the kernel has no such pages

_madvise = getattr(ctypes.CDLL(None), "madvise", None)


TRIED_BYTES = 64 << 20  # read into pages of each kind before one is chosen


@dataclass(slots=True)
class PageChoice:
    """Whether memory that is read into has huge pages: tried without, then with, then the faster.

    Attributes:
        bytes: How many were read so far, without huge pages and with.
        seconds: In how long.
    """

    bytes: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    seconds: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    @property
    def has_huge_pages(self) -> bool:
        """Whether to ask for them next.

        Example:
            >>> pages = PageChoice()
            >>> for is_huge, seconds in ((False, 0.04), (True, 0.02)):
            ...     assert pages.has_huge_pages == is_huge
            ...     pages.record(is_huge, TRIED_BYTES, seconds)
            >>> pages.has_huge_pages
            True
        """
        for is_huge, count in self.bytes.items():
            if count < TRIED_BYTES:
                return is_huge
        rates = [self.bytes[kind] / max(self.seconds[kind], 1e-9) for kind in (False, True)]
        return rates[True] > rates[False]

    def record(self, is_huge: bool, nbytes: int, seconds: float) -> None:
        """Note how long a read took into new memory, with huge pages or without, until both are."""
        if self.bytes[is_huge] < TRIED_BYTES:
            self.bytes[is_huge] += nbytes
            self.seconds[is_huge] += seconds


def advise_huge_pages(tensor: torch.Tensor) -> int:
    """Have the kernel back the whole huge pages of a contiguous tensor's memory with such.

    Only a hint, to be given before the memory is touched: it is ignored where the kernel has none
    to give. No page outside of the tensor is asked for, so that no more memory is taken. torch can
    do it for all that it allocates (THP_MEM_ALLOC_ENABLE), but reads that variable once, before a
    server that imports this may have a say.

    Returns:
        The bytes that were asked for.
    """
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if _madvise is None or tensor.device.type != "cpu" or stop <= start:
        return 0
    _madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)
    return stop - start
