"""An engine on ranks that outlive it, so that nobody waits for new ones to start."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shardkit.runtime.engine.channel import OnTokens
from shardkit.runtime.engine.engine import Engine
from shardkit.runtime.engine.messages import Message, load_request
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.runtime.engine.scheduler import Limits
from shardkit.runtime.load_options import LoadOptions


class LentRanks:
    """Ranks that an engine may use, but not end."""

    def __init__(self, ranks: RankProcesses) -> None:
        self.size = ranks.size
        self._ranks = ranks

    @property
    def pids(self) -> list[int]:
        """The process id of each rank."""
        return self._ranks.pids

    def request(self, request: Message, on_tokens: OnTokens | None = None) -> list[Message]:
        """Have every rank handle a request. Raises RanksError."""
        return self._ranks.request(request, on_tokens)

    def pause(self) -> None:
        """Let the ranks wait for the next request."""
        self._ranks.pause()

    def check(self) -> None:
        """Raise RanksLost if a rank has ended."""
        self._ranks.check()

    def describe_silence(self) -> str:
        """Which ranks give no sign of life, in words."""
        return self._ranks.describe_silence()

    def kill(self) -> None:
        """Nothing: what runs comes to its own end."""

    def close(self) -> None:
        """Nothing: the pool ends its ranks."""


@contextmanager
def run_engine(
    ranks: RankProcesses,
    folder: Path,
    limits: Limits | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Engine]:
    """An engine of a shard folder on running ranks, which outlive it."""
    load = load_request(folder, LoadOptions(dtype))
    with Engine(folder, lambda: LentRanks(ranks), load, limits) as engine:
        yield engine
