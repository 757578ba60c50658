"""Keeps ranks running between the models that are proven on them."""

from dataclasses import dataclass, field
from types import TracebackType

from shardkit.runtime.engine.rank_processes import RankProcesses


@dataclass
class RankPool:
    """Groups of CPU ranks by size, started when first needed, stopped at the end of a `with`."""

    _running: dict[int, RankProcesses] = field(default_factory=dict)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for ranks in self._running.values():
            ranks.close()

    def of(self, size: int) -> RankProcesses:
        """A group of `size` running ranks, restarted if a failure has stopped them.

        Raises RanksError.
        """
        if size not in self._running or not self._running[size].pids:
            self._running[size] = RankProcesses(size, device="cpu")
        return self._running[size]
