"""What drives the ranks of one model: the process that started them, or rank 0 under torchrun."""

import threading
from pathlib import Path
from typing import Protocol

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.diagnosis import Fault, combine_faults
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.engine.channel import OnTokens, StoreChannel
from shardkit.runtime.engine.messages import Message

GRACE = 5.0  # seconds in which a call may finish while the ranks are closed


class RankController(Protocol):
    """Ranks that one process controls."""

    size: int

    def request(self, request: Message, on_tokens: OnTokens | None = None) -> list[Message]:
        """Have every rank handle a request, and return the responses, rank 0's first.

        Args:
            request: What to do.
            on_tokens: Receives the token ids of each step of a streamed generate. Once it returns
                False, every rank stops after the same step, one or two steps later.

        Raises:
            RanksError: A rank failed, died or did not respond; the message names it.
        """


class EngineRanks(RankController, Protocol):
    """Ranks that an engine drives."""

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks that this process has started, by rank."""

    def pause(self) -> None:
        """Let the ranks wait for the next request, for as long as need be. Raises RanksError."""

    def check(self) -> None:
        """Raise RanksLost if a rank is known to be dead, though nothing was asked of it."""

    def describe_silence(self) -> str:
        """Which ranks give no sign of life, in words; "" if all do, or none is known to."""

    def kill(self) -> None:
        """End the ranks at once, even while another thread waits for a response."""

    def close(self) -> None:
        """End the ranks, by force if need be."""


class TorchrunRanks:
    """The ranks that torchrun started: rank 0 makes requests, every other rank calls `follow`.

    Args:
        group: The ranks.
        own_folder: The shard folder as it is called on this rank's host; None if it is as a
            request names it.
    """

    def __init__(self, group: TensorParallelGroup, own_folder: Path | None = None) -> None:
        # Not above, since a rank process runs that module as its program.
        from shardkit.runtime.engine.worker import Worker

        self.size = group.tp_size
        self.pids: list[int] = []
        self._channel = StoreChannel(group)
        self._worker = Worker(self._channel, group, own_folder)
        self._group = group
        self._turn = threading.RLock()  # collectives of two threads would be out of step
        self._is_closed = self._is_used = False

    @property
    def is_follower(self) -> bool:
        """Whether this is not rank 0."""
        return self._group.tp_rank != 0

    def reuse(self) -> "TorchrunRanks":
        """These ranks, for the first engine. Raises RanksError for another: only torchrun can."""
        if self._is_used:
            raise RanksError("torchrun started these ranks: let it start others (--max-restarts)")
        self._is_used = True
        return self

    def request(self, request: Message, on_tokens: OnTokens | None = None) -> list[Message]:
        """Have every rank handle a request; only rank 0's response is returned.

        Raises:
            RanksError: It failed on rank 0, or another rank was lost.
        """
        with self._turn:
            if self._is_closed:
                raise RanksLost("the ranks have been closed")
            self._channel.on_tokens = on_tokens
            self._channel.publish(request)
            response = self._worker.respond(request)
            if not response.header.get("lost"):
                self._settle(response)
        if "error" in response.header:
            fault = Fault(response.header["error"], response.header["lost"])
            raise combine_faults({0: fault}, self.size)
        return [Message(response.header, {n: t.cpu() for n, t in response.tensors.items()})]

    def _settle(self, response: Message) -> None:
        try:
            self._channel.settle(response)
        except RanksError as error:
            self._group.failure = self._group.failure or str(error)
            raise RanksLost(str(error)) from None

    def follow(self) -> None:
        """Handle rank 0's requests until it closes. Raises RanksError."""
        self._worker.run()

    def pause(self) -> None:
        """Let the other ranks wait for the next request without a collective."""
        with self._turn:
            if not self._is_closed:
                self._channel.pause()

    def check(self) -> None:
        """Raise RanksLost if another rank has left, or gives no heartbeat."""
        if self._group.failure:
            raise RanksLost(self._group.failure)
        if self._group.link is not None:
            try:
                self._group.link.check_others()
            except RanksError as error:
                self._group.failure = str(error)
                raise RanksLost(str(error)) from None

    def describe_silence(self) -> str:
        """Which other ranks have left or give no heartbeat."""
        try:
            self.check()
        except RanksError as error:
            return str(error)
        return ""

    def kill(self) -> None:
        """Nothing: torchrun ends its ranks."""

    def close(self) -> None:
        """End every other rank's `follow`, unless they have ended.

        What another thread still runs has a moment to finish; then its next collective fails, and
        the other ranks end with this one's reason.
        """
        if not self._turn.acquire(timeout=GRACE):
            self._group.failure = self._group.failure or "the engine was closed during a call"
            with self._turn:
                self._is_closed = True
                self._group.leave()
            return
        try:
            if not self._is_closed and not self._group.failure:
                self._is_closed = True
                self._channel.close()
        finally:
            self._turn.release()
