"""The rendezvous store that torch's environment variables name, each answer with a deadline."""

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardkit.errors import RanksLost
from shardkit.runtime.distributed.diagnosis import brief

PREFIX = "shardkit/"  # and how often torchrun has started these ranks anew
RETRY = 0.1  # seconds between two tries to reach the store
T = TypeVar("T")


class RankStore:
    """Keys and texts that every rank sees.  Raises RanksLost once the store does not answer.

    torch's own client waits for ever on a store whose process is stopped; so it is used in a
    thread, which is left behind then.
    """

    def __init__(self, rank: int, join: float, patience: float) -> None:
        """Reach it within `join` seconds; each later answer has `patience` seconds."""
        self.patience = patience
        self.here = rank == 0 and not _kept_by_agent()
        self.keeper = "the process that started the ranks" if _kept_by_agent() else "rank 0"
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Reply] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="shardkit-store", daemon=True)
        self._thread.start()
        self._lost = ""
        if not self.here and not _reachable(join):
            raise RanksLost(f"{self.keeper} died or never started: no store there in {join:g} s")
        self._store = self._do(lambda: connect_store(self.here, join), join)

    def set(self, key: str, text: str) -> None:
        """Set a key."""
        self._do(lambda: self._store.set(key, text))

    def add(self, key: str) -> int:
        """Count a key up by one, and give the count."""
        return self._do(lambda: int(self._store.add(key, 1)))

    def read(self, keys: Mapping[int, str]) -> dict[int, str]:
        """The texts of those keys that are set."""
        return self._do(
            lambda: {
                rank: self._store.get(key).decode()
                for rank, key in keys.items()
                if self._store.check([key])
            }
        )

    def close(self) -> None:
        """End the thread, if it answers."""
        self._asked.put(None)
        if not self._lost:
            self._thread.join(1.0)

    def _do(self, act: Callable[[], T], seconds: float | None = None) -> T:
        if self._lost:
            raise RanksLost(self._lost)
        seconds = seconds or self.patience
        reply: Reply = queue.SimpleQueue()
        self._asked.put((act, reply))
        try:
            found, error = reply.get(timeout=seconds)
        except queue.Empty:
            self._lost = f"{self.keeper} is stopped: its store does not answer in {seconds:g} s"
            raise RanksLost(self._lost) from None
        if error is not None:
            self._lost = f"{self.keeper} died: its store is gone ({brief(error)})"
            raise RanksLost(self._lost) from None
        answer: T = found
        return answer

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            act, reply = asked
            try:
                reply.put((act(), None))
            except Exception as error:
                reply.put((None, error))


Reply = queue.SimpleQueue[tuple[Any, Exception | None]]


def connect_store(host: bool, join: float) -> dist.Store:
    """A connection to the store of MASTER_ADDR and MASTER_PORT; `host` it here as well."""
    store = dist.TCPStore(
        *_address(),
        is_master=host,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=join),
    )
    return dist.PrefixStore(PREFIX + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def beat_key(rank: int) -> str:
    """Where the signs of life of a rank that `Ranks` started are, for who keeps its store."""
    return f"{PREFIX}0/beat/{rank}"


def _address() -> tuple[str, int]:
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])


def _reachable(seconds: float) -> bool:
    """Whether something comes to listen there; torch's client overruns its time, and is loud."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(_address(), timeout=1.0):
            return True
        time.sleep(RETRY)
    return False


def _kept_by_agent() -> bool:
    """Whether torchrun, or whoever started the ranks, keeps the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
