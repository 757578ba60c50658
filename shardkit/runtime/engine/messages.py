"""Messages between a controller and its ranks: a JSON header and named tensors.

No pickle: the header is JSON and the tensors are safetensors bytes, so a message cannot run code.
On a socket and in a broadcast a message is two sizes (little-endian, 8 bytes each), the header and
the tensors.
"""

import json
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from shardkit.dtypes import torch_name
from shardkit.runtime.engine.values import pack_value
from shardkit.runtime.packing import Dequantize

MAX_HEADER = 64 << 20
MAX_TENSORS = 64 << 30
SIZES = struct.Struct("<QQ")
INPUTS, PROMPT = "inputs.", "prompt."  # before the names of the tensors of a measurement


@dataclass(frozen=True)
class Message:
    """A request or a response: a `header` of JSON values, and tensors by name."""

    header: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def load_request(
    folder: Path,
    dtype: torch.dtype | None,
    verify: bool = False,
    dequantize: Dequantize = "forward",
    reduce_dtype: torch.dtype | None = None,
) -> Message:
    """Load each rank's shard of a folder; `dtype` None is the checkpoint's own."""
    dtypes = {"dtype": dtype, "reduce_dtype": reduce_dtype}
    names = {key: "" if value is None else torch_name(value) for key, value in dtypes.items()}
    header = {"action": "load", "folder": str(folder.resolve()), **names}
    return Message({**header, "verify": verify, "dequantize": dequantize})


def forward_request(
    inputs: Mapping[str, torch.Tensor], options: Mapping[str, object] | None = None
) -> Message:
    """Run a forward pass; `options` None means one without a cache."""
    return Message({"action": "forward", "options": options}, inputs)


def generate_request(
    inputs: Mapping[str, torch.Tensor],
    options: Mapping[str, object],
    *,
    seed: int | None = None,
    stream: bool = False,
    with_logits: bool = False,
) -> Message:
    """Generate with options of transformers' `generate`; rank 0 sends each token with `stream`."""
    header = {"action": "generate", "options": options, "seed": seed, "stream": stream}
    return Message({**header, "with_logits": with_logits}, inputs)


def call_request(
    method: str, arguments: Mapping[str, object], *, seed: int | None = None, stream: bool = False
) -> Message:
    """Call the model's `forward` or `generate` with these arguments, and return what it returns.

    Raises RequestError for an argument that cannot be sent.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed = {name: pack_value(value, tensors, name) for name, value in arguments.items()}
    header = {"action": "call", "method": method, "arguments": packed, "seed": seed}
    return Message({**header, "stream": stream}, tensors)


def prepare_request() -> Message:
    """Run the model once, and find out what an engine can do with it."""
    return Message({"action": "prepare"})


def step_request(tokens: Mapping[int, int], join: Iterable[Mapping[str, object]]) -> Message:
    """Do one step of the running batch; see `batching.batch_runner.BatchRunner.run_step`.

    Args:
        tokens: The last token of each sequence that stays, by number; every other leaves.
        join: Of each prompt that joins, the fields of `batch_runner.JoiningPrompt`.
    """
    pairs = [list(pair) for pair in tokens.items()]
    return Message({"action": "step", "tokens": pairs, "join": [dict(p) for p in join]})


def trace_request(inputs: Mapping[str, torch.Tensor], modules: Iterable[str]) -> Message:
    """Run a forward pass and return what the named modules output, as each rank has it."""
    return Message({"action": "trace", "modules": list(modules)}, inputs)


def measure_request(
    inputs: Mapping[str, torch.Tensor], prompt: Mapping[str, torch.Tensor]
) -> Message:
    """Measure what each rank uses in a forward pass over `inputs`, and as it goes on a `prompt`."""
    tensors = {INPUTS + name: value for name, value in inputs.items()}
    return Message(
        {"action": "measure"}, tensors | {PROMPT + name: value for name, value in prompt.items()}
    )


def select_prefixed(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def encode_message(message: Message) -> tuple[bytes, bytes]:
    """A message as bytes, to be sent one after the other: sizes and header, then the tensors."""
    header = json.dumps(message.header).encode()
    # Of its own each, as safetensors wants it: a model may return one tensor by two names.
    plain = {name: _copy_plain(tensor) for name, tensor in message.tensors.items()}
    payload = save_tensors(plain) if plain else b""
    return SIZES.pack(len(header), len(payload)) + header, payload


def _copy_plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def decode_message(data: bytes) -> Message:
    """The message of bytes that `encode_message` has made. Raises ValueError for any others."""
    if len(data) < SIZES.size:
        raise ValueError(f"message of {len(data)} bytes is cut short")
    header_size, payload_size = _unpack_sizes(data[: SIZES.size])
    start = SIZES.size + header_size
    if len(data) != start + payload_size:
        raise ValueError(f"message of {len(data)} bytes, but {start + payload_size} are declared")
    return _parse(data[SIZES.size : start], data[start:])


def send_message(sock: socket.socket, message: Message) -> None:
    """Send a message. Raises OSError if the other side is gone."""
    for part in encode_message(message):
        sock.sendall(part)


def receive_message(sock: socket.socket) -> Message | None:
    """The next message; None when the other side has closed. Raises OSError or ValueError."""
    sizes = _read_exactly(sock, SIZES.size)
    if sizes is None:
        return None
    header_size, payload_size = _unpack_sizes(sizes)
    header, payload = _read_exactly(sock, header_size), _read_exactly(sock, payload_size)
    if header is None or payload is None:
        return None
    return _parse(header, payload)


def _unpack_sizes(data: bytes) -> tuple[int, int]:
    header_size, payload_size = SIZES.unpack(data)
    if header_size > MAX_HEADER or payload_size > MAX_TENSORS:
        raise ValueError(f"message of {header_size} and {payload_size} bytes is too large")
    return header_size, payload_size


def _parse(header: bytes, payload: bytes) -> Message:
    return Message(json.loads(header), load_tensors(payload) if payload else {})


def _read_exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return bytes(data)
