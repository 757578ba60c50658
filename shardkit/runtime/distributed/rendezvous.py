"""The rendezvous store that torch's environment variables name, with a deadline for each answer."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardkit.errors import RanksLost
from shardkit.runtime.distributed.diagnosis import first_sentence
from shardkit.runtime.distributed.rank_environment import (
    has_agent_store,
    read_attempt,
    read_store_address,
)

PREFIX = "shardkit/"  # and how often torchrun has restarted these ranks
RETRY = 0.1  # seconds between two attempts to reach the store
T = TypeVar("T")


class RankStore:
    """Keys and texts that every rank can read. Raises RanksLost once the store does not answer.

    torch's own client waits forever for a store whose process is stopped; so it runs in a thread,
    which is then abandoned.
    """

    def __init__(self, rank: int, join: float, patience: float) -> None:
        """Reach it within `join` seconds; each later answer may take `patience` seconds."""
        self.patience = patience
        self.is_host = rank == 0 and not has_agent_store()
        self.host_description = (
            "the process that started the ranks" if has_agent_store() else "rank 0"
        )
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Reply] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="shardkit-store", daemon=True)
        self._thread.start()
        self._failure = ""
        if not self.is_host and not _wait_for_listener(join):
            raise RanksLost(
                f"{self.host_description} died or never started: no store there in {join:g} s"
            )
        self._store = self._call(lambda: connect_store(self.is_host, join), join)

    def set(self, key: str, text: str) -> None:
        """Set a key."""
        self._call(lambda: self._store.set(key, text))

    def add(self, key: str) -> int:
        """Increment a key's count by one, and return the count."""
        return self._call(lambda: int(self._store.add(key, 1)))

    def read(self, keys: Mapping[int, str]) -> dict[int, str]:
        """The texts of those keys that are set."""
        return self._call(
            lambda: {
                rank: self._store.get(key).decode()
                for rank, key in keys.items()
                if self._store.check([key])
            }
        )

    def close(self) -> None:
        """End the thread, if it still answers."""
        self._calls.put(None)
        if not self._failure:
            self._thread.join(1.0)

    def _call(self, act: Callable[[], T], seconds: float | None = None) -> T:
        if self._failure:
            raise RanksLost(self._failure)
        seconds = seconds or self.patience
        reply: Reply = queue.SimpleQueue()
        self._calls.put((act, reply))
        try:
            value, error = reply.get(timeout=seconds)
        except queue.Empty:
            self._failure = (
                f"{self.host_description} is stopped: its store does not answer in {seconds:g} s"
            )
            raise RanksLost(self._failure) from None
        if error is not None:
            self._failure = (
                f"{self.host_description} died: its store is gone ({first_sentence(error)})"
            )
            raise RanksLost(self._failure) from None
        result: T = value
        return result

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            act, reply = call
            try:
                reply.put((act(), None))
            except Exception as error:
                reply.put((None, error))


Reply = queue.SimpleQueue[tuple[Any, Exception | None]]


def connect_store(host: bool, join: float) -> dist.Store:
    """A connection to the store at MASTER_ADDR and MASTER_PORT; with `host`, start it here."""
    store = dist.TCPStore(
        *read_store_address(),
        is_master=host,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=join),
    )
    return dist.PrefixStore(PREFIX + read_attempt(), store)


def heartbeat_key(rank: int) -> str:
    """The key of a rank's heartbeats, as the process sees it that hosts the store of its ranks."""
    return f"{PREFIX}0/heartbeat/{rank}"


def _wait_for_listener(seconds: float) -> bool:
    """Whether something listens there in time; torch's client overruns its time, and is loud."""
    address, end = read_store_address(), time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1.0):
            return True
        time.sleep(RETRY)
    return False
