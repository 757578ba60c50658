"""Counts NaN and infinite values in a tensor's bytes, fast enough for a copy to do it on its way.

Weights are finite but for damage or a fault of training, so one look at the byte with the sign and
the top of the exponent of each value nearly always ends it: no module beyond Python's own is as
light, and the rest is done for the few blocks in which that byte tells of more.
"""

from collections.abc import Mapping
from functools import reduce
from operator import and_

from shardkit.dtypes import DTYPES, Dtype

BLOCK_BYTES = 1 << 16  # looked at together, to stay in a core's cache


def count_nonfinite(data: memoryview, dtype: str) -> int:
    """How many of the whole values in `data`, of a safetensors dtype, are NaN or infinite."""
    form = DTYPES[dtype]
    if not form.nonfinite:
        return 0
    starts = range(0, len(data), BLOCK_BYTES)
    return sum(_count_block(bytes(data[start : start + BLOCK_BYTES]), form) for start in starts)


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    """Which tensors hold NaN or infinite values, the first of them with how many."""
    (name, count), *others = counts.items()
    more = f", and so are some of {len(others)} more tensors" if others else ""
    return f"{count} values of {name} are NaN or infinite{more}"


def _count_block(block: bytes, form: Dtype) -> int:
    """Count in one block. Of most blocks, each value's top byte alone shows that all are finite."""
    at, values = form.nonfinite[0]
    top = block[at :: form.float_bytes]
    if not any(value in top for value in values):
        return 0
    planes = [_match_bytes(block[at :: form.float_bytes], wanted) for at, wanted in form.nonfinite]
    return reduce(and_, planes).bit_count()


def _match_bytes(column: bytes, values: bytes) -> int:
    """A number with a bit for each byte of `column` that is one of `values`."""
    return int.from_bytes(column.translate(bytes(value in values for value in range(256))))
