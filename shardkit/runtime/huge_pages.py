"""Asks Linux for huge pages: first touch of large memory is most of what reading into it costs."""

import ctypes

import torch

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14  # linux/mman.h; glibc's madvise(2) fails if the kernel has no such pages

_madvise = getattr(ctypes.CDLL(None), "madvise", None)


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
