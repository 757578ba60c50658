"""What brings a rank its requests: a socket from the process that started it, or torchrun's store.

The worker is the same for both. Under torchrun rank 0 is the controller: it publishes each request
to the other ranks, and runs it, too.
"""

import socket
from typing import Protocol

import torch

from shardkit.errors import RanksError
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.engine.messages import (
    Message,
    decode_message,
    encode_message,
    receive_message,
    send_message,
)
from shardkit.runtime.engine.stop_flag import StopFlag

MAX_WAIT = 24 * 3600.0  # seconds between two requests of rank 0, which must only be alive


class Channel(Protocol):
    """Requests in, responses out."""

    stop_flag: StopFlag | None  # how a stream is stopped; None if it cannot be

    def receive(self) -> Message | None:
        """The next request; None once there will be no more."""

    def send(self, response: Message) -> None:
        """Return a response, or a part of one."""


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


class StoreChannel:
    """From rank 0 to the other ranks of a group.

    Rank 0 announces a request in the rendezvous store, so that the others wait for it without a
    collective, however long it takes, as long as rank 0 is alive. The request itself is broadcast.
    In a process group that the caller made there is no store, and the announcement is broadcast.
    """

    def __init__(self, group: TensorParallelGroup) -> None:
        self.group = group
        self.stop_flag: StopFlag | None = None

    def publish(self, request: Message) -> None:
        """Have every other rank receive a request; for rank 0. Raises RanksError."""
        self._publish(b"".join(encode_message(request)))

    def close(self) -> None:
        """Have every other rank receive None; for rank 0. Raises RanksError."""
        self._publish(b"")

    def receive(self) -> Message | None:
        """The next request of rank 0; None once it has closed. Raises RanksError."""
        size = self._receive_size()
        if size == 0:
            return None
        data = self.group.broadcast(torch.empty(size, dtype=torch.uint8))
        return decode_message(data.cpu().numpy().tobytes())

    def send(self, response: Message) -> None:
        """Nothing, since rank 0 computes the same. Raises RanksError for an error response.

        Then this rank ends, and the others learn of it at once instead of in a timeout.
        """
        if "error" in response.header:
            raise RanksError(response.header["error"])

    def _publish(self, data: bytes) -> None:
        if self.group.link is not None:
            self.group.link.publish(str(len(data)))
        else:
            self.group.broadcast(torch.tensor([len(data)]))
        if data:
            self.group.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _receive_size(self) -> int:
        if self.group.link is None:
            return int(self.group.broadcast(torch.zeros(1, dtype=torch.int64)))
        self.group.set_status("waiting for rank 0")
        return int(self.group.link.wait_for(0, MAX_WAIT))
