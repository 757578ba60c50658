"""One start of an engine: its ranks, what they can do, and the thread that drives them."""

import logging
import warnings
from collections.abc import Callable

import torch

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.batching.abilities import Abilities
from shardkit.runtime.engine.controller import EngineRanks
from shardkit.runtime.engine.messages import Message, prepare_request
from shardkit.runtime.engine.request_loop import RequestLoop
from shardkit.runtime.engine.scheduler import Limits, Scheduler
from shardkit.runtime.engine.sequence_plans import SequencePlanner
from shardkit.runtime.engine.status import EngineStatus

JOIN = 5.0  # seconds for the thread to end
log = logging.getLogger(__name__)


class RunningModel:
    """A model on ranks that takes requests, until it is stopped or fails.

    Args:
        start_ranks: Starts the ranks, which this object then owns.
        load: The request that loads the model into them.
        limits: What it takes on at once.

    Attributes:
        ranks: What runs the model.
        dtype: What it computes in.
        abilities: What it can do.
        loop: The thread that drives the ranks.
        planner: Makes sequences of requests.
    """

    def __init__(
        self, start_ranks: Callable[[], EngineRanks], load: Message, limits: Limits
    ) -> None:
        self._start = start_ranks, load, limits
        self.ranks = start_ranks()
        try:
            loaded = self.ranks.request(load)[0].header
            by_rank = [r.header["abilities"] for r in self.ranks.request(prepare_request())]
        except BaseException:
            self.ranks.close()
            raise
        self.dtype: torch.dtype = getattr(torch, loaded["dtype"])
        if warning := loaded["warning"]:
            warnings.warn(warning, RuntimeWarning, stacklevel=4)  # where launch was called
        self.abilities = Abilities(**by_rank[0])
        if self.abilities.failure:
            log.warning("a forward pass over two tokens failed: %s", self.abilities.failure)
        room = min(each["cache_tokens"] for each in by_rank)
        size, tokens = limits.max_batch_size, limits.max_batch_tokens or room
        log.info("%d sequences at most, %d tokens of KV cache", size, tokens)
        self._scheduler = Scheduler(size, limits.max_queue, tokens)
        self.loop = RequestLoop(self.ranks, self._scheduler, not self.abilities.obstacle)
        self.planner = SequencePlanner(self.abilities, tokens, limits.max_queue)

    def stop(self, error: RanksError) -> None:
        """Fail what runs or waits, and end the ranks, at once if they are busy."""
        is_idle = self.loop.is_idle()
        self.loop.close(error)
        if not is_idle:
            self.ranks.kill()
        self.ranks.close()
        self.loop.join(JOIN)

    def restart(self) -> "RunningModel":
        """Stop this one, and start another like it.

        Raises RanksError if that fails, which is then why this one can no longer be used.
        """
        self.stop(RanksLost("the engine was restarted"))
        try:
            return RunningModel(*self._start)
        except RanksError as error:
            self.loop.failure = error
            raise

    def read_status(self, draining: bool) -> EngineStatus:
        """What it is doing, and what it can do."""
        loop, scheduler = self.loop, self._scheduler
        return EngineStatus(
            loop.failure is None, str(loop.failure or ""), draining,
            self.ranks.size, tuple(self.ranks.pids), loop.num_running, loop.num_waiting,
            loop.num_steps, loop.num_tokens, scheduler.max_batch_size,
            scheduler.max_batch_tokens, self.abilities.obstacle,
        )  # fmt: skip
