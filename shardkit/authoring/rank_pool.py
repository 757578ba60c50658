"""Ranks kept running between the models that are tried on them."""

from dataclasses import dataclass, field
from types import TracebackType

from shardkit.runtime.engine.rank_processes import RankProcesses


@dataclass
class RankPool:
    """CPU ranks of several sizes, each started when it is first needed; to be used in a `with`."""

    _running: dict[int, RankProcesses] = field(default_factory=dict)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for ranks in self._running.values():
            ranks.close()

    def of(self, size: int) -> RankProcesses:
        """Ranks that run: started again once a failure has stopped them.  Raises RanksError."""
        if size not in self._running or not self._running[size].pids:
            self._running[size] = RankProcesses(size, device="cpu")
        return self._running[size]
