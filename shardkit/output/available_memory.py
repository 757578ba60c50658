"""How much memory there is, limits of containers included, and sizes as users write them."""

import os
import re
import resource
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

from shardkit.errors import UsageError

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self")
NO_LIMIT = 1 << 60  # a cgroup says that it has no limit by a number near 2^63
MARGIN = 0.9  # of the memory that there is: what may be taken
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
LARGE_BLOCK = 512 << 10  # also what a block of a model outputs: among small ones it leaves gaps
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # a variable that torch reads
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `80G`, `1.5GB` or `512MiB`. Raises UsageError for anything else.

    Example:
        >>> parse_size("1.5G"), parse_size("512 MiB")
        (1500000000, 536870912)
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"size {text!r}: write it as 80G, 1.5GB or 512MiB")
    order = ["", "K", "M", "G", "T"].index(match[2].upper())
    return int(float(match[1]) * (1024**order if match[3] else 1000**order))


def choose_max_memory(limit: int | None) -> int:
    """The bytes that may be taken: those allowed, and otherwise what there is, less a margin."""
    return limit if limit is not None else int(MARGIN * measure_available_memory())


def fits_page_cache(nbytes: int) -> bool:
    """Whether memory has room for as many bytes that are written, and as many that are read."""
    return 2 * nbytes <= measure_available_memory()


def check_memory(needed: int, allowed: int, what: str) -> None:
    """Raise UsageError if more memory is needed than is allowed."""
    if needed > allowed:
        megabytes = -(-needed // 10**6)
        raise UsageError(
            f"{what} needs {megabytes} MB of memory, and {allowed // 10**6} MB are allowed: free"
            f" that much, or allow it with --max-memory {megabytes}M"
        )


def measure_available_memory(process: Path = PROCESS, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process may still take: of the machine, its cgroups and its own limit.

    Args:
        process: Where the kernel describes the process (proc(5)).
        cgroups: Where control groups are mounted (cgroups(7)), version 2 or 1.
    """
    rooms = [
        _read_field(process.parent / "meminfo", "MemAvailable:"),
        *_iter_rooms(process, cgroups),
    ]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        rooms.append(limit - _read_field(process / "status", "VmSize:"))
    return max(min(rooms), 0)


def measure_resident_memory(process: Path = PROCESS) -> int:
    """Bytes of memory that this process has now (proc(5))."""
    return _read_field(process / "status", "VmRSS:")


def _iter_rooms(process: Path, cgroups: Path) -> Iterator[int]:
    """What each control group that the process is in has left, from its own to the outermost."""
    for line in _read_text(process / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(root):
                yield from _measure_room(group, *names)


def _measure_room(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    limits, used = _read_text(group / limit).strip(), _read_text(group / usage).strip()
    if limits.isdecimal() and used.isdecimal() and int(limits) < NO_LIMIT:
        reclaimable = _read_field(group / "memory.stat", cache, 1)
        yield int(limits) - int(used) + reclaimable


def _read_field(path: Path, name: str, unit: int = 1024) -> int:
    lines = (line.split() for line in _read_text(path).splitlines())
    return next((int(words[1]) * unit for words in lines if words and words[0] == name), 0)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def map_large_blocks() -> None:
    """Have the allocator map large blocks by themselves, so that freed ones go back at once.

    Otherwise the first one that is freed makes it keep others as large (mallopt(3)). torch asks for
    huge pages of such blocks, if its first one comes later: they take a fault for each 2 MiB, not
    for each 4 KiB. All threads have one pool for the others, as only one of them runs at a time.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if (set_option := getattr(CDLL(None), "mallopt", None)) is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BLOCK)
        set_option(M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Give the system what the allocator keeps of free memory, where it can (malloc_trim(3)).

    Each thread's allocations have a pool of their own, in which much can stay.
    """
    if (trim := getattr(CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
