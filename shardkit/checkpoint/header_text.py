"""Reads a header as safetensors writes it by one regular expression, without an object for each.

JSON allows the same to be written in other ways. Of those nothing is read here, so that whoever
needs them parses the text as JSON: it takes four times as long.
"""

import re
from typing import Any, NamedTuple

from shardkit.checkpoint.header_columns import MAX_DIM, MAX_OFFSET, MAX_RANK, Columns
from shardkit.dtypes import DTYPES
from shardkit.strict_json import JsonError, parse_object_at

METADATA = "__metadata__"  # the one key of a header that is not a tensor
START = f'{{"{METADATA}":'
NUMBER = "(?:0|[1-9][0-9]{0,18})"
ENTRY = re.compile(
    r'"([^"\\]*)":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],"data_offsets":'
    rf"\[({NUMBER}),({NUMBER})\]\}}([,}}])"
)
ENTRY_LENGTH = len('"":{"dtype":"","shape":[],"data_offsets":[,]}')
SHAPE = re.compile(rf"(?:{NUMBER}(?:,{NUMBER})*)?")


class HeaderText(NamedTuple):
    """What a header says, its ranges counted from where the data begins, and not yet compared."""

    metadata: dict[str, Any]
    columns: Columns


def scan_header(raw: bytes) -> HeaderText | None:
    """What a header says; None if it is spelled otherwise, or wrong in any way."""
    if not raw.isascii():
        return None
    text = raw.decode().rstrip(" ")
    try:
        metadata, at = parse_object_at(text, len(START)) if text.startswith(START) else ({}, 0)
    except JsonError:
        return None
    rows = ENTRY.findall(text, at + 1)
    if not rows or text[at : at + 1] != ("," if at else "{"):
        return None
    names, dtypes, shapes, starts, stops, ends = zip(*rows, strict=True)
    covered = sum(len("".join(column)) for column in (names, dtypes, shapes, starts, stops, ends))
    if at + 1 + covered + len(rows) * ENTRY_LENGTH != len(text):
        return None  # something else is between them
    if "".join(ends) != "," * (len(ends) - 1) + "}" or len({METADATA, *names}) != len(names) + 1:
        return None
    parsed = {shape: sizes for shape in set(shapes) if (sizes := _parse_shape(shape)) is not None}
    if len(parsed) < len(set(shapes)) or not DTYPES.keys() >= set(dtypes):
        return None
    kinds = list(zip(dtypes, map(parsed.__getitem__, shapes), strict=True))
    firsts, lasts = list(map(int, starts)), list(map(int, stops))
    if max(max(firsts), max(lasts)) >= MAX_OFFSET:
        return None
    return HeaderText(metadata, Columns(names, kinds, firsts, lasts))


def _parse_shape(text: str) -> tuple[int, ...] | None:
    """The sizes in a list's text; None if they are not what a shape can have."""
    if not SHAPE.fullmatch(text):
        return None
    sizes = tuple(map(int, filter(None, text.split(","))))
    return sizes if len(sizes) <= MAX_RANK and max(sizes, default=0) < MAX_DIM else None
