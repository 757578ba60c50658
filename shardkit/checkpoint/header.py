"""The safetensors header, read strictly.

The format: 8 bytes of little-endian length, that many bytes of JSON, then the data
(https://github.com/huggingface/safetensors#format). What is refused here includes everything the
safetensors library refuses, and duplicate names, which it accepts.
"""

import math
import os
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from shardkit import strict_json
from shardkit.dtypes import DTYPES
from shardkit.errors import CheckpointError, LayoutError, ShardkitError
from shardkit.files import open_regular_file
from shardkit.strict_json import JsonError, put_off_collection, quote
from shardkit.tensor import TensorSpec

MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_TENSORS = 250_000  # in one file: what can be checked in 256 MB; models have up to 210 000
MAX_VALUES = 12 * MAX_TENSORS  # an entry is 8 commas and brackets, and one more for each dimension
MAX_NAME = 65_536
MAX_RANK = 64
MAX_DIM = 1 << 48
METADATA = "__metadata__"  # the one key of a header that is not a tensor
LFS_POINTER = b"version https://git-lfs"
DtypeAndShape = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape
_FIELDS = ("dtype", "shape", "data_offsets")
_KEYS, _read_fields = frozenset(_FIELDS), itemgetter(*_FIELDS)


class Entry(NamedTuple):
    """A tensor in a file; its bytes are `[start, stop)` of the file."""

    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds: tensors in the order of their bytes, and free-form metadata."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    raw: bytes


def read_header(path: Path, error: type[ShardkitError] = CheckpointError) -> Header:
    """Read and check a safetensors file's header. Raises `error`, naming file and fault."""
    fd = open_regular_file(path, error)
    try:
        return read_open_header(fd, path, error)
    finally:
        os.close(fd)


def read_open_header(fd: int, path: Path, error: type[ShardkitError] = CheckpointError) -> Header:
    """Read and check the header of an open file; `path` is for messages. Raises `error`."""
    size = os.fstat(fd).st_size
    try:
        length = parse_header_length(os.pread(fd, len(LFS_POINTER), 0), size)
        return parse_header(os.pread(fd, length, 8), size)
    except (JsonError, LayoutError) as fault:
        raise error(f"{path}: {fault}") from None
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from None


def parse_header_length(start: bytes, size: int) -> int:
    """The bytes of header that a file's first bytes announce. Raises JsonError."""
    if start.startswith(LFS_POINTER):
        raise JsonError("a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if size < 8:
        raise JsonError(f"{size} bytes, too short for a safetensors file: truncated")
    length: int = struct.unpack("<Q", start[:8])[0]
    if length > MAX_HEADER:
        raise JsonError(
            f"header of {length} bytes, more than the {MAX_HEADER} allowed: not a safetensors file"
        )
    if length > size - 8:
        raise JsonError(
            f"header of {length} bytes in a file of {size}: truncated, or not a safetensors file"
        )
    return length


@put_off_collection()
def parse_header(raw: bytes, file_size: int) -> Header:
    """The header's tensors, their bytes proven to cover the file exactly. Raises JsonError."""
    if not raw.startswith(b"{"):
        raise JsonError("header does not start with '{'")
    _check_count(raw.count(b'"data_offsets"'))  # before anything is made of them
    table = strict_json.parse_json(raw, MAX_VALUES)
    if not isinstance(table, dict):
        raise JsonError("header is not an object")
    metadata = table.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise JsonError("__metadata__ is not a table of strings")
    _check_count(len(table))
    _check_names(table)
    base, sizes = 8 + len(raw), dict[DtypeAndShape, int]()
    entries = [_parse_entry(name, value, base, sizes) for name, value in table.items()]
    entries.sort(key=attrgetter("start", "stop", "spec.name"))
    covered = base
    for entry in entries:
        if entry.start != covered:
            fault = (
                "overlaps the one before" if entry.start < covered else "leaves a hole before it"
            )
            raise JsonError(f"tensor {quote(entry.spec.name)} {fault}")
        covered = entry.stop
    if covered != file_size:
        word = "truncated" if file_size < covered else "extended"
        raise JsonError(f"{word}: tensors end at byte {covered}, the file at {file_size}")
    return Header(tuple(entries), metadata, raw)


def encode_header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """A file's first bytes: length and header for tensors stored one after another, in order.

    Padded with spaces so that the data starts at a multiple of 8, as the library writes it.
    """
    table: dict[str, Any] = {METADATA: metadata} if metadata else {}
    at = 0
    for spec in specs:
        stop = at + spec.nbytes
        table[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (at, stop)}
        at = stop
    text = strict_json.encode_compact(table)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_name(name: str) -> None:
    """Raise JsonError for a tensor name that is empty, too long, unprintable, or not a tensor's."""
    if not name or len(name) > MAX_NAME or not name.isprintable() or name == METADATA:
        raise JsonError(f"tensor name {quote(name)} is empty, reserved, too long or unprintable")


def _check_names(names: Collection[str]) -> None:
    """Check all names at once; which one is wrong is asked only if one is."""
    if (
        "" in names
        or not all(map(str.isprintable, names))
        or max(map(len, names), default=0) > MAX_NAME
    ):
        for name in names:
            check_name(name)


def _check_count(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise JsonError(f"{tensors} tensors, more than the {MAX_TENSORS} allowed")


def _parse_entry(name: str, value: Any, base: int, sizes: dict[DtypeAndShape, int]) -> Entry:
    """A tensor's entry; `sizes` has the bytes of what dtypes and shapes came before it."""
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise JsonError(f"tensor {quote(name)}: entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = _read_fields(value)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise JsonError(f"tensor {quote(name)}: unknown dtype {quote(dtype)}")
    if not _are_sizes(shape, MAX_DIM) or len(shape) > MAX_RANK:
        raise JsonError(f"tensor {quote(name)}: shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise JsonError(f"tensor {quote(name)}: data_offsets are not a range")
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop < 1 << 63:
        raise JsonError(f"tensor {quote(name)}: data_offsets are not a range")
    spec = TensorSpec(name, dtype, tuple(shape))
    if (needed := sizes.get((dtype, spec.shape))) is None:
        needed = sizes[dtype, spec.shape] = _count_bytes(spec)
    if needed != stop - start:
        raise JsonError(f"tensor {quote(name)}: {stop - start} bytes, but its shape needs {needed}")
    return Entry(spec, base + start, base + stop)


def _count_bytes(spec: TensorSpec) -> int:
    """The bytes that a shape needs, too large a one refused, even if it is of no elements."""
    if math.prod(filter(None, spec.shape)) * DTYPES[spec.dtype].bits >= 1 << 64:
        raise JsonError(f"tensor {quote(spec.name)}: shape is too large, zeros left aside")
    return spec.nbytes


def _are_sizes(value: Any, limit: int) -> bool:
    if not isinstance(value, list):
        return False
    for size in value:  # noqa: SIM110 - a loop is three times as fast, and there are 100,000 lists
        if type(size) is not int or not 0 <= size < limit:
            return False
    return True
