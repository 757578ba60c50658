"""The safetensors header, read strictly.

The format: 8 bytes of little-endian length, that many bytes of JSON, then the data
(https://github.com/huggingface/safetensors#format). What is refused here includes everything the
safetensors library refuses, and duplicate names, which it accepts.
"""

import os
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from shardkit import strict_json
from shardkit.checkpoint.header_columns import place_columns, read_entries
from shardkit.checkpoint.header_text import METADATA, HeaderText, scan_header
from shardkit.errors import CheckpointError, LayoutError, ShardkitError
from shardkit.files import open_regular_file
from shardkit.strict_json import JsonError, put_off_collection, quote
from shardkit.tensor import DtypeAndShape, TensorSpec

MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_TENSORS = 250_000  # in one file: what can be checked in 256 MB; models have up to 210 000
MAX_VALUES = 12 * MAX_TENSORS  # an entry is 8 commas and brackets, and one more for each dimension
MAX_NAME = 65_536
LFS_POINTER = b"version https://git-lfs"


class Entry(NamedTuple):
    """A tensor in a file; its bytes are `[start, stop)` of the file."""

    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says it holds: tensors in the order of their bytes, and free-form metadata.

    Attributes:
        names: The tensors' names.
        kinds: Their dtypes and shapes; equal ones are one object.
        starts: Where each one's bytes start in the file; they end where the next one's start.
        metadata: Text by name.
        raw: The bytes that say all this.
    """

    names: tuple[str, ...]
    kinds: tuple[DtypeAndShape, ...]
    starts: tuple[int, ...]
    metadata: dict[str, str]
    raw: bytes

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every tensor and its place; a plan of a hundred thousand tensors does without."""
        specs = map(TensorSpec, self.names, *zip(*self.kinds, strict=True)) if self.kinds else ()
        return tuple(Entry(s, at, at + s.nbytes) for s, at in zip(specs, self.starts, strict=True))

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each tensor's bytes start in the file."""
        return dict(zip(self.names, self.starts, strict=True))


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
@put_off_collection()
def parse_header(raw: bytes, file_size: int) -> Header:
    """The header's tensors, their bytes proven to cover the file exactly. Raises JsonError."""
    if not raw.startswith(b"{"):
        raise JsonError("header does not start with '{'")
    _check_count(raw.count(b'"data_offsets"'))  # before anything is made of them
    metadata, columns = scan_header(raw) or _parse_json(raw)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise JsonError("__metadata__ is not a table of strings")
    _check_names(columns.names)
    names, kinds, starts, _ = place_columns(columns, 8 + len(raw), file_size)
    return Header(tuple(names), tuple(kinds), tuple(starts), metadata, raw)


def _parse_json(raw: bytes) -> HeaderText:
    """What a header says that is not as the library writes it. Raises JsonError."""
    table = strict_json.parse_json(raw, MAX_VALUES)
    if not isinstance(table, dict):
        raise JsonError("header is not an object")
    metadata = table.pop(METADATA, {})
    _check_count(len(table))
    return HeaderText(metadata, read_entries(table))


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
        or not "".join(names).isprintable()
        or max(map(len, names), default=0) > MAX_NAME
    ):
        for name in names:
            check_name(name)


def _check_count(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise JsonError(f"{tensors} tensors, more than the {MAX_TENSORS} allowed")
