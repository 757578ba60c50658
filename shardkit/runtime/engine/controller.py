"""What drives the ranks of one model: the process that started them, or rank 0 under torchrun."""

from typing import Protocol

from shardkit.runtime.distributed.diagnosis import Fault, combine_faults
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.engine.channel import StoreChannel
from shardkit.runtime.engine.messages import Message
from shardkit.runtime.engine.worker import Worker


class RankController(Protocol):
    """Ranks that one process controls."""

    size: int

    def request(self, request: Message) -> list[Message]:
        """Have every rank handle a request, and return the responses, rank 0's first.

        Raises:
            RanksError: A rank failed, died or did not respond; the message names it.
        """


class TorchrunRanks:
    """The ranks that torchrun started: rank 0 makes requests, every other rank calls `follow`."""

    def __init__(self, group: TensorParallelGroup) -> None:
        self.size = group.tp_size
        self._channel = StoreChannel(group)
        self._worker = Worker(self._channel, group)
        self._group = group
        self._failed = False

    def request(self, request: Message) -> list[Message]:
        """Have every rank handle a request; only rank 0's response is returned.

        Raises:
            RanksError: It failed on rank 0, or another rank was lost.
        """
        self._channel.publish(request)
        response = self._worker.respond(request)
        if "error" in response.header:
            self._failed = True
            fault = Fault(response.header["error"], response.header["lost"])
            raise combine_faults({0: fault}, self.size)
        return [Message(response.header, {n: t.cpu() for n, t in response.tensors.items()})]

    def follow(self) -> None:
        """Handle rank 0's requests until it closes. Raises RanksError."""
        self._worker.run()

    def close(self) -> None:
        """End every other rank's `follow`. Raises RanksError."""
        # Without a store this is a collective, for which ranks that have failed do not come.
        if self._group.link is not None or not self._failed:
            self._channel.close()
