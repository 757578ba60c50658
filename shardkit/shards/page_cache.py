"""Asks Linux what it holds of a file in memory, so that reading it would wait for no disk."""

import ctypes
import mmap

CACHESTAT = 451  # the number of cachestat(2) on every architecture, since Linux 6.5

_syscall = getattr(ctypes.CDLL(None), "syscall", None)


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class _Counts(ctypes.Structure):
    """Pages of a range, of which only the first count is read here."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "written_back", "evicted", "evicted_recently")
    ]


def count_cached_bytes(fd: int, offset: int, size: int) -> int:
    """How many bytes of a range of a file are in the page cache, in whole pages.

    It reads nothing and changes nothing. Where the kernel does not say, there are none: an older
    one, or a file that this user may not write.

    Args:
        fd: A descriptor of the file.
        offset: Where the range begins.
        size: Its bytes; 0 for all that follow.

    Example:
        >>> with open("weights.safetensors", "rb") as file:  # doctest: +SKIP
        ...     count_cached_bytes(file.fileno(), 0, 1 << 20)
        1048576
    """
    if _syscall is None:
        return 0
    counts, span = _Counts(), _Range(offset, size)
    if _syscall(CACHESTAT, fd, ctypes.byref(span), ctypes.byref(counts), 0):
        return 0
    return int(counts.cached) * mmap.PAGESIZE
