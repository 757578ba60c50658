"""A header's entries, checked column by column: there may be a hundred thousand of them.

Whether a column is sound is asked of all entries at once; which one is wrong, only if one is.
"""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter, sub
from typing import Any, NamedTuple

from shardkit.dtypes import DTYPES
from shardkit.strict_json import JsonError, quote
from shardkit.tensor import DtypeAndShape, TensorSpec

MAX_RANK = 64
MAX_DIM = 1 << 48
MAX_OFFSET = 1 << 63
FIELDS = ("dtype", "shape", "data_offsets")

_get_fields = itemgetter(*FIELDS)


class Columns(NamedTuple):
    """Names, dtypes and shapes of tensors, and where their bytes are: `[start, stop)`."""

    names: Sequence[str]
    kinds: Sequence[DtypeAndShape]
    starts: Sequence[int]
    stops: Sequence[int]


def read_entries(table: Mapping[str, Any]) -> Columns:
    """The entries of a header, their ranges as they are stated. Raises JsonError."""
    for name, value in table.items():
        _check_entry(name, value)
    entries = list(map(_get_fields, table.values()))
    kinds = [(dtype, tuple(shape)) for dtype, shape, _ in entries]
    starts, stops = ([offsets[end] for _, _, offsets in entries] for end in range(2))
    return Columns(list(table), kinds, starts, stops)


def place_columns(columns: Columns, base: int, file_size: int) -> Columns:
    """The tensors in the order of their bytes, which cover a file from byte `base` on exactly.

    Raises JsonError.
    """
    names, kinds, starts, stops = columns
    starts, stops = [base + start for start in starts], [base + stop for stop in stops]
    columns = _sort_columns(Columns(names, kinds, starts, stops))
    _check_sizes(columns)
    _check_cover(columns, base, file_size)
    return columns


def _check_entry(name: str, value: Any) -> None:
    """Raise JsonError for an entry with something that a tensor cannot have."""
    if not isinstance(value, dict) or value.keys() != set(FIELDS):
        raise JsonError(f"tensor {quote(name)}: entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = _get_fields(value)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise JsonError(f"tensor {quote(name)}: unknown dtype {quote(dtype)}")
    if not _are_integers(shape, MAX_DIM) or len(shape) > MAX_RANK:
        raise JsonError(f"tensor {quote(name)}: shape is not a list of sizes")
    if not _are_integers(offsets, MAX_OFFSET) or len(offsets) != 2:
        raise JsonError(f"tensor {quote(name)}: data_offsets are not a range")


def _are_integers(value: Any, limit: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < limit for n in value)


def _sort_columns(columns: Columns) -> Columns:
    """In the order of their bytes, which almost all files have them in."""
    names, kinds, starts, stops = columns
    if starts[1:] == stops[:-1]:
        return columns
    order = sorted(range(len(names)), key=lambda at: (starts[at], stops[at], names[at]))
    return Columns(
        [names[at] for at in order],
        [kinds[at] for at in order],
        [starts[at] for at in order],
        [stops[at] for at in order],
    )


def _check_sizes(columns: Columns) -> None:
    """Raise JsonError unless every tensor has as many bytes as its dtype and shape need."""
    names, kinds, starts, stops = columns
    counts: dict[DtypeAndShape, int] = {}
    for name, kind in zip(names, kinds, strict=True):
        if kind not in counts:
            counts[kind] = _count_bytes(TensorSpec(name, *kind))
    needed, actual = list(map(counts.__getitem__, kinds)), list(map(sub, stops, starts))
    if needed != actual:
        at = next(at for at, (a, b) in enumerate(zip(needed, actual, strict=True)) if a != b)
        if actual[at] < 0:
            raise JsonError(f"tensor {quote(names[at])}: data_offsets are not a range")
        raise JsonError(
            f"tensor {quote(names[at])}: {actual[at]} bytes, but its shape needs {needed[at]}"
        )


def _count_bytes(spec: TensorSpec) -> int:
    """The bytes that a shape needs, too large a one refused, even if it is of no elements."""
    if math.prod(filter(None, spec.shape)) * DTYPES[spec.dtype].bits >= 1 << 64:
        raise JsonError(f"tensor {quote(spec.name)}: shape is too large, zeros left aside")
    return spec.nbytes


def _check_cover(columns: Columns, base: int, file_size: int) -> None:
    """Raise JsonError unless the tensors lie one after another, and end with the file."""
    names, _, starts, stops = columns
    covered = [base, *stops]
    if starts != covered[:-1]:
        at = next(at for at, start in enumerate(starts) if start != covered[at])
        fault = "overlaps the one before" if starts[at] < covered[at] else "leaves a hole before it"
        raise JsonError(f"tensor {quote(names[at])} {fault}")
    if covered[-1] != file_size:
        word = "truncated" if file_size < covered[-1] else "extended"
        raise JsonError(f"{word}: tensors end at byte {covered[-1]}, the file at {file_size}")
