"""Asks Linux for huge pages: first touch of large memory is most of what reading into it costs.

With them, first touch takes a tenth of the time where the memory is there, and twice as long where
a virtual machine's host has to find it first, which it may have to from some tensor on. So what
reads tries both, and goes by how long each took last.
"""

import ctypes
from dataclasses import dataclass, field

import torch

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14  # linux/mman.h; glibc's madvise(2) fails if the kernel has no such pages

_madvise = getattr(ctypes.CDLL(None), "madvise", None)


LEAST_BYTES = 2 * HUGE_PAGE  # of a read that tells how fast pages of a kind are
TRIED_BYTES = 32 * HUGE_PAGE  # at most, of a read that tries huge pages first


@dataclass(slots=True)
class PageChoice:
    """Whether memory that is read into has huge pages: those of the kind that was faster last.

    Attributes:
        rates: The bytes a second of the last read without huge pages, and of the last with.
    """

    rates: dict[bool, float] = field(default_factory=dict)

    def choose(self, nbytes: int) -> bool:
        """Whether to ask for them for so many bytes: first not, then once, then if faster.

        Example:
            >>> pages = PageChoice()
            >>> for is_huge, seconds in ((False, 0.02), (True, 0.01)):
            ...     assert pages.choose(32 << 20) == is_huge
            ...     pages.record(is_huge, 32 << 20, seconds)
            >>> pages.choose(32 << 20)
            True
        """
        if len(self.rates) < 2:
            return False in self.rates and nbytes <= TRIED_BYTES
        return self.rates[True] > self.rates[False]

    def record(self, is_huge: bool, nbytes: int, seconds: float) -> None:
        """Note how long a read took into new memory, with huge pages or without."""
        if nbytes >= LEAST_BYTES:
            self.rates[is_huge] = nbytes / max(seconds, 1e-9)


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
