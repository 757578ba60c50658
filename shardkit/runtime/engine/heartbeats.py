"""Which rank processes are alive, by the heartbeats that they write to the store of their ranks."""

import time
from collections.abc import Iterable

import torch.distributed as dist

from shardkit.runtime.distributed.rendezvous import heartbeat_key


def find_silent(store: dist.Store, ranks: Iterable[int], seconds: float) -> list[int]:
    """The ranks that have given heartbeats, but none for so many seconds from now."""
    before = read_heartbeats(store, ranks)
    time.sleep(seconds)
    now = read_heartbeats(store, before)
    return [rank for rank, heartbeat in before.items() if now.get(rank) == heartbeat]


def read_heartbeats(store: dist.Store, ranks: Iterable[int]) -> dict[int, str]:
    """The last heartbeat of those ranks that have given one."""
    return {
        rank: store.get(key).decode() for rank in ranks if store.check([key := heartbeat_key(rank)])
    }
