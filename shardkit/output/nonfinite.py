"""Counts NaN and infinite values in a tensor's bytes, fast enough for a copy to do it on its way.

Weights are finite but for damage or a fault of training, so one look at the byte with the sign and
the top of the exponent of each value nearly always ends it: no module beyond Python's own is as
light, and the rest is done for the few blocks in which that byte tells of more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_

BLOCK = 1 << 16  # bytes looked at together, to stay in a core's cache


@dataclass(frozen=True, slots=True)
class _Format:
    """A little-endian float of `width` bytes: those values of its bytes that make it non-finite.

    `marks` has each byte that matters, the top one first, and which values of it do.
    """

    width: int
    marks: tuple[tuple[int, bytes], ...]


def _with(bits: int) -> bytes:
    """Every byte that has all of `bits` set."""
    return bytes(value for value in range(256) if value & bits == bits)


# By safetensors dtype.  Formats of 4 and 6 bits have neither; of the 8-bit ones E5M2 alone has
# infinities (OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0 for E8M0;
# FNUZ: Noune et al. 2022).  A C64 is two F32, counted apart.
_F32 = _Format(4, ((3, _with(0x7F)), (2, _with(0x80))))
_FORMATS = {
    "F64": _Format(8, ((7, _with(0x7F)), (6, _with(0xF0)))),
    "F32": _F32,
    "C64": _F32,
    "BF16": _Format(2, ((1, _with(0x7F)), (0, _with(0x80)))),
    "F16": _Format(2, ((1, _with(0x7C)),)),
    "F8_E5M2": _Format(1, ((0, _with(0x7C)),)),
    "F8_E4M3": _Format(1, ((0, _with(0x7F)),)),
    "F8_E8M0": _Format(1, ((0, b"\xff"),)),
    "F8_E4M3FNUZ": _Format(1, ((0, b"\x80"),)),
    "F8_E5M2FNUZ": _Format(1, ((0, b"\x80"),)),
}


def count_nonfinite(data: memoryview, dtype: str) -> int:
    """How many of the whole values in `data`, of a safetensors dtype, are NaN or infinite."""
    form = _FORMATS.get(dtype)
    if form is None:
        return 0
    return sum(
        _count_block(bytes(data[start : start + BLOCK]), form)
        for start in range(0, len(data), BLOCK)
    )


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    """Which tensors hold NaN or infinite values, the first of them with how many."""
    (name, count), *others = counts.items()
    more = f", and so are some of {len(others)} more tensors" if others else ""
    return f"{count} values of {name} are NaN or infinite{more}"


def _count_block(block: bytes, form: _Format) -> int:
    at, values = form.marks[0]
    top = block[at :: form.width]
    if not any(value in top for value in values):
        return 0
    planes = [_match_bytes(block[at :: form.width], values) for at, values in form.marks]
    return reduce(and_, planes).bit_count()


def _match_bytes(column: bytes, values: bytes) -> int:
    """A number with a bit for each byte of `column` that is one of `values`."""
    return int.from_bytes(column.translate(bytes(value in values for value in range(256))))
