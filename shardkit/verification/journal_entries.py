"""A journal's entries to and from bytes: a line of JSON for each call of a block, then tensors.

What is read is checked as if it were hostile. Floating-point numbers are in hexadecimal, exact.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from shardkit.dtypes import BY_TORCH_NAME, torch_name
from shardkit.strict_json import JsonError, JsonObject, encode_canonical, quote, read_integer
from shardkit.verification.block_record import BlockComparison
from shardkit.verification.blocks import BlockCall
from shardkit.verification.tolerance import Comparison, Error

MAX_DIMS = 16
CALL_KEYS = "run block number is_plain outputs rounding comparisons read peak sha256"


@dataclass(frozen=True, slots=True)
class CallNotes:
    """One call of a block, of all the models that ran together.

    Attributes:
        run: Which models, in which pass.
        call: The call.
        is_plain: Whether the block outputs one tensor.
        outputs: What the reference output, if it ran.
        rounding: The unsharded models' errors, by dtype.
        comparisons: The ranks'.
        read: Bytes of weights that were read up to here.
        peak: The most bytes of weights that there were.
    """

    run: str
    call: BlockCall
    is_plain: bool
    outputs: tuple[torch.Tensor, ...]
    rounding: Mapping[torch.dtype, list[Error]]
    comparisons: tuple[BlockComparison, ...]
    read: int
    peak: int


@dataclass(frozen=True, slots=True)
class CallLine:
    """The line of a call, and the bytes of tensors that must follow it."""

    fields: JsonObject
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @property
    def nbytes(self) -> int:
        """How many bytes follow the line."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.shapes)


def encode_call(notes: CallNotes) -> bytes:
    """An entry: its line, and the bytes of the reference's outputs."""
    data = b"".join(map(_encode_tensor, notes.outputs))
    line: dict[str, Any] = {
        "run": notes.run,
        "block": notes.call.block,
        "number": notes.call.number,
        "is_plain": notes.is_plain,
        "outputs": [[torch_name(t.dtype), list(t.shape)] for t in notes.outputs],
        "rounding": {
            torch_name(dtype): [_encode_errors(error) for error in errors]
            for dtype, errors in notes.rounding.items()
        },
        "comparisons": [_encode_comparison(each) for each in notes.comparisons],
        "read": notes.read,
        "peak": notes.peak,
    }
    line["sha256"] = _hash_entry(line, data)
    return encode_canonical(line) + b"\n" + data


def parse_call_line(value: Any) -> CallLine:
    """The line of a call. Raises JsonError."""
    fields = JsonObject(value, "call", CALL_KEYS)
    return CallLine(fields, fields.items("outputs", _read_shape))


def parse_call(line: CallLine, data: bytes) -> CallNotes:
    """A call from its line and the bytes after it. Raises JsonError."""
    fields, outputs, at = line.fields, [], 0
    table = {key: fields.value(key) for key in CALL_KEYS.split() if key != "sha256"}
    if _hash_entry(table, data) != fields.hex("sha256"):
        raise JsonError("a call's entry is not as it was written")
    for dtype, shape in line.shapes:
        stop = at + math.prod(shape) * dtype.itemsize
        part = bytearray(data[at:stop])
        values = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
        outputs.append(values.reshape(shape))
        at = stop
    call = BlockCall(fields.string("block"), fields.integer("number"))
    rounding = {
        _read_dtype(name): [Error(*_read_floats(pair, 2)) for pair in _read_list(pairs)]
        for name, pairs in fields.table("rounding").items()
    }
    comparisons = fields.items("comparisons", lambda item, _: _read_comparison(item, call))
    return CallNotes(
        fields.string("run"), call, fields.boolean("is_plain"), tuple(outputs), rounding,
        comparisons, fields.integer("read"), fields.integer("peak"),
    )  # fmt: skip


def _hash_entry(line: Mapping[str, Any], data: bytes) -> str:
    return sha256(encode_canonical(line) + data).hexdigest()


def _encode_tensor(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _encode_errors(*errors: Error) -> list[str]:
    return [number.hex() for error in errors for number in (error.max, error.rms)]


def _encode_comparison(each: BlockComparison) -> list[Any]:
    result = each.result
    numbers = _encode_errors(result.sharded, result.unsharded, result.allowed)
    return [each.tp_rank, torch_name(each.dtype), each.rows_aside, *numbers]


def _read_comparison(value: Any, call: BlockCall) -> BlockComparison:
    tp_rank, dtype, rows, *numbers = _read_list(value, 9)
    n = _read_floats(numbers, 6)
    result = Comparison(Error(n[0], n[1]), Error(n[2], n[3]), Error(n[4], n[5]))
    rank, aside = read_integer(tp_rank, "rank"), read_integer(rows, "rows")
    return BlockComparison(call, rank, _read_dtype(dtype), result, aside)


def _read_shape(value: Any, where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    name, shape = _read_list(value, 2)
    sizes = _read_list(shape)
    if len(sizes) > MAX_DIMS:
        raise JsonError(f"{where}: has {len(sizes)} dimensions, more than the {MAX_DIMS} allowed")
    return _read_dtype(name), tuple(read_integer(size, where, 1 << 40) for size in sizes)


def _read_dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in BY_TORCH_NAME:
        raise JsonError(f"{quote(name)} is not a dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _read_floats(values: Any, count: int) -> list[float]:
    try:
        return [float.fromhex(value) for value in _read_list(values, count)]
    except (TypeError, ValueError):
        raise JsonError(f"{quote(values)} are not numbers in hexadecimal") from None


def _read_list(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or count not in (None, len(value)):
        raise JsonError(f"{quote(value)} is not a list of {count or 'values'}")
    return value
