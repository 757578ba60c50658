"""Messages between the controlling process and its ranks: a JSON header and named tensors.

No pickle: a header is JSON and tensors are safetensors bytes, so a message cannot run code.
"""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

MAX_HEADER = 64 << 20
MAX_TENSORS = 64 << 30
SIZES = struct.Struct("<QQ")


@dataclass(frozen=True)
class Message:
    """What is asked or answered: `header` of JSON values, and tensors by name."""

    header: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def send(sock: socket.socket, message: Message) -> None:
    """Send a message.  Raises OSError if the other side is gone."""
    header = json.dumps(message.header).encode()
    plain = {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
    payload = save_tensors(plain) if plain else b""
    sock.sendall(SIZES.pack(len(header), len(payload)) + header)
    sock.sendall(payload)


def receive(sock: socket.socket) -> Message | None:
    """The next message; None when the other side has closed.  Raises OSError or ValueError."""
    sizes = _exactly(sock, SIZES.size)
    if sizes is None:
        return None
    header_size, payload_size = SIZES.unpack(sizes)
    if header_size > MAX_HEADER or payload_size > MAX_TENSORS:
        raise ValueError(f"message of {header_size} and {payload_size} bytes is too large")
    header, payload = _exactly(sock, header_size), _exactly(sock, payload_size)
    if header is None or payload is None:
        return None
    return Message(json.loads(header), load_tensors(payload) if payload else {})


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return bytes(data)
