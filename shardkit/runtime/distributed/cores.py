"""How many cores this process may use, and how many of them are one rank's share."""

import os
from contextlib import suppress
from pathlib import Path

from shardkit.runtime.distributed.rank_environment import count_local_ranks

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds, and of how many


def count_cores(quota: Path = CPU_QUOTA) -> int:
    """The cores that this process may use: of its affinity, and of its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with suppress(OSError, ValueError):
        used, period = quota.read_text().split()
        cores = min(cores, int(used) // int(period))
    return cores


def count_rank_cores() -> int:
    """The cores for each rank of this host, at least one."""
    return max(1, count_cores() // max(1, count_local_ranks()))
