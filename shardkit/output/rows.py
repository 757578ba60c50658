"""The rows of a block of a tensor as they lie in buffers, and parts of them packed in order.

Seen around its sharded dimension a tensor is `[outer, axis, inner]`: each outer index is a row of
bytes, of which each rank has a part.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardkit.layout import Span

JOINED_BYTES = 128 << 10  # at once, to stay in a core's cache; more of a row is not packed
PACKED_BYTES = 1 << 20  # in a piece: of half as much a write costs more

_rooms = threading.local()


@dataclass(frozen=True, slots=True)
class RowPart:
    """A part of every row of a block: row `n`'s is `data[n * width + start : n * width + stop]`.

    Attributes:
        data: A buffer that can be written to.
        width: The bytes from one row to the next in it.
        start: Where the part of the first row starts.
        stop: Where it stops.
    """

    data: memoryview
    width: int
    start: int
    stop: int


def cut_rows(parts: Sequence[RowPart], spans: Sequence[Span]) -> list[RowPart]:
    """What spans of the rows, in bytes, hold, in their own order.

    Args:
        parts: The rows whole, part by part.
        spans: Ranges of a row's bytes.

    Returns:
        The parts of the rows, neighbors in a buffer joined.

    Example:
        >>> rows = [RowPart(memoryview(bytearray(b"abcdefgh")), 4, 0, 4)]
        >>> [(part.start, part.stop) for part in cut_rows(rows, [Span(3, 4), Span(0, 2)])]
        [(3, 4), (0, 2)]
    """
    cuts: list[RowPart] = []
    for first, last in spans:
        at = 0
        for part in parts:
            start, stop = part.start + max(0, first - at), part.start + last - at
            at += part.stop - part.start
            stop = min(stop, part.stop)
            if start >= stop:
                continue
            if cuts and cuts[-1].data is part.data and cuts[-1].stop == start:
                start = cuts.pop().start
            cuts.append(RowPart(part.data, part.width, start, stop))
    return cuts


def pack_rows(parts: Sequence[RowPart], count: int) -> Iterator[memoryview]:
    """The parts of the first row, then those of the second, and so on, in pieces to be written.

    Small ones are packed, many at once: to write each costs a system call. Pieces can be written
    to, and hold what they hold until the next is asked for.

    Args:
        parts: Parts of the rows, in order.
        count: The number of rows.
    """
    width = sum(part.stop - part.start for part in parts)
    ranges = [(part.data, part.width, part.start, part.stop) for part in parts]
    if width > JOINED_BYTES:
        for row in range(count):
            yield from (data[row * n + start : row * n + stop] for data, n, start, stop in ranges)
        return
    room, used = _find_room(), 0
    step = JOINED_BYTES // max(1, width)
    for first in range(0, count, step):
        rows = range(first, min(first + step, count))
        if used + len(rows) * width > len(room):
            yield room[:used]
            used = 0
        # To assign each takes three times as long, and other threads wait.
        packed = b"".join(
            [data[row * n + a : row * n + b] for row in rows for data, n, a, b in ranges]
        )
        room[used : used + len(packed)] = packed
        used += len(packed)
    yield room[:used]


def _find_room() -> memoryview:
    """The thread's own, as memory that is new each time costs as much as to pack."""
    if not hasattr(_rooms, "room"):
        _rooms.room = memoryview(bytearray(PACKED_BYTES))
    room: memoryview = _rooms.room
    return room
