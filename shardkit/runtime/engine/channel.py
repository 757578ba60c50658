"""What brings a rank its requests: a socket from the process that started it, or torchrun's store.

The worker is the same for both. Under torchrun rank 0 is the controller: it publishes each request
to the other ranks, and runs it, too.
"""

import math
import socket
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

from shardkit.errors import RanksError
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.engine.messages import (
    Message,
    decode_message,
    encode_message,
    receive_message,
    send_message,
)
from shardkit.runtime.engine.stop_flag import StopFlag, StopOnFlag

FIRST_BYTES = 4096  # of a broadcast that most requests fit in
SIZE_BYTES = 8  # little-endian: how many bytes a request has, or one of these
PAUSE, CLOSE = -1, 0

OnTokens = Callable[[list[int]], bool]


class Channel(Protocol):
    """Requests in, responses out."""

    def receive(self) -> Message | None:
        """The next request; None once there will be no more."""

    def send(self, response: Message) -> None:
        """Return a response, or a part of one."""

    def make_stopping(self, tp_rank: int) -> StoppingCriteria | None:
        """What stops a generate on every rank at the same step; None if nothing can."""


class SocketChannel:
    """A connection to the controlling process on this host."""

    def __init__(self, sock: socket.socket, stop_flag: StopFlag | None = None) -> None:
        self.sock = sock
        self.stop_flag = stop_flag

    def receive(self) -> Message | None:
        """The next request; None once the controlling process has closed. Raises OSError."""
        return receive_message(self.sock)

    def send(self, response: Message) -> None:
        """Send a response. Raises OSError if the controlling process is gone."""
        send_message(self.sock, response)

    def make_stopping(self, tp_rank: int) -> StoppingCriteria | None:
        """What stops a generate once the controlling process has set the flag."""
        return None if self.stop_flag is None else StopOnFlag(self.stop_flag, tp_rank)


class StoreChannel:
    """From rank 0 to the other ranks of a group.

    Between requests the ranks wait for an announcement in the rendezvous store, without a
    collective, however long it takes, as long as rank 0 is alive. It begins a run of requests, each
    of which is broadcast, until rank 0 has none and pauses. In a process group that the caller made
    there is no store, and the ranks always wait in a broadcast.
    """

    def __init__(self, group: TensorParallelGroup) -> None:
        self.group = group
        self.on_tokens: OnTokens | None = None  # receives what rank 0 generates
        self._is_running = group.link is None  # whether the ranks wait in a broadcast
        self._goes_on = True

    def publish(self, request: Message) -> None:
        """Have every other rank receive a request; for rank 0. Raises RanksError."""
        data = b"".join(encode_message(request))
        self._begin()
        self._broadcast(len(data), data)

    def pause(self) -> None:
        """Let the other ranks wait without a collective, for as long as need be; for rank 0."""
        if self.group.link is not None and self._is_running:
            self._broadcast(PAUSE)
            self._is_running = False

    def close(self) -> None:
        """Have every other rank receive None; for rank 0. Raises RanksError."""
        self._begin()
        self._broadcast(CLOSE)

    def receive(self) -> Message | None:
        """The next request of rank 0; None once it has closed. Raises RanksError."""
        while True:
            if self.group.link is not None and not self._is_running:
                self.group.set_status("waiting for rank 0")
                self.group.link.wait_for(0, math.inf)
                self._is_running = True
            data = self._receive_broadcast()
            if data is not None:
                return decode_message(data) if data else None
            self._is_running = False

    def send(self, response: Message) -> None:
        """Give tokens to who asked for them, on rank 0; otherwise nothing is to be sent.

        Rank 0 computes what the others do, so they need not answer. Raises RanksError for an error
        that rank 0 has not.
        """
        if "tokens" in response.header:
            self._goes_on = self.on_tokens is None or self.on_tokens(response.header["tokens"])
        else:
            self.settle(response)

    def settle(self, response: Message) -> None:
        """Go on after an error if every rank has it; each of them calls this with its response.

        A rank that fails alone would be in another collective than the others from then on. Raises
        RanksError for one.
        """
        error = response.header.get("error") or response.header.get("refused")
        if not error or self.group.tp_size == 1:
            return
        if self.group.link is None or response.header.get("lost"):
            raise RanksError(error)
        self.group.link.all_exchange(error, self.group.link.timeouts.collective)

    def make_stopping(self, tp_rank: int) -> StoppingCriteria | None:
        """What stops a generate once rank 0's caller wants no more: one broadcast a step."""
        self._goes_on = True
        return StopByBroadcast(self.group, lambda: self._goes_on)

    def _begin(self) -> None:
        if self.group.link is not None and not self._is_running:
            self.group.link.publish("requests")
            self._is_running = True

    def _broadcast(self, size: int, data: bytes = b"") -> None:
        first = size.to_bytes(SIZE_BYTES, "little", signed=True) + data
        self._broadcast_bytes(first[:FIRST_BYTES].ljust(FIRST_BYTES))
        if len(first) > FIRST_BYTES:
            self._broadcast_bytes(first[FIRST_BYTES:])

    def _broadcast_bytes(self, data: bytes) -> bytes:
        sent = self.group.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return sent.cpu().numpy().tobytes()

    def _receive_broadcast(self) -> bytes | None:
        """The bytes of a request; none of them if rank 0 has closed, None if it pauses."""
        first = self._broadcast_bytes(bytes(FIRST_BYTES))
        size = int.from_bytes(first[:SIZE_BYTES], "little", signed=True)
        if size == PAUSE:
            return None
        data = first[SIZE_BYTES : SIZE_BYTES + size]
        if missing := size - len(data):
            data += self._broadcast_bytes(bytes(missing))
        return data


class StopByBroadcast(StoppingCriteria):  # type: ignore[misc]
    """Stops a generate on every rank after the same step, which rank 0 decides."""

    def __init__(self, group: TensorParallelGroup, goes_on: Callable[[], bool]) -> None:
        self._group, self._goes_on = group, goes_on

    def __call__(
        self, input_ids: torch.Tensor, scores: Any, **_options: object
    ) -> torch.BoolTensor:
        """Whether each sequence `[B]` is done, given the token ids `[B, T]` so far."""
        stop = int(self._group.broadcast(torch.tensor([not self._goes_on()], dtype=torch.uint8)))
        done = torch.full((len(input_ids),), bool(stop), device=input_ids.device, dtype=torch.bool)
        return done  # type: ignore[return-value]
