"""Stretches of one axis: how they follow one another, and what they cover. Integers only."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shardkit.errors import LayoutError


class Span(NamedTuple):
    """A half-open range [start, stop) of indices along one axis."""

    start: int
    stop: int


class Cover(NamedTuple):
    """Whole blocks [start, stop) of an axis, and where the indices lie in them that are wanted."""

    start: int
    stop: int
    wanted: tuple[Span, ...]


class Tile(NamedTuple):
    """A stretch [start, stop) of an axis, and where a rank keeps it: from `local` of its shard."""

    start: int
    stop: int
    tp_rank: int
    local: int


def coalesce(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same indices in the same order, neighbors merged and empty spans dropped."""
    result: list[Span] = []
    for span in spans:
        if span.start == span.stop:
            continue
        if result and result[-1].stop == span.start:
            result[-1] = Span(result[-1].start, span.stop)
        else:
            result.append(span)
    return tuple(result)


def cover_spans(spans: Iterable[Span], block: int, axis_length: int) -> tuple[Cover, ...]:
    """The whole blocks of an axis that spans of it lie in, in the order of the spans.

    Args:
        spans: What is wanted of the axis.
        block: The indices of a block; the last of the axis may have fewer.
        axis_length: How long the axis is.

    Raises:
        LayoutError: If a block with fewer indices would come before another.

    Example:
        >>> cover_spans([Span(192, 384)], 128, 768)
        (Cover(start=128, stop=384, wanted=(Span(start=64, stop=256),)),)
    """
    covers: list[Cover] = []
    local = last = 0
    for start, stop in spans:
        first, end = start // block * block, min(-(-stop // block) * block, axis_length)
        if covers and last <= start and first <= covers[-1].stop:
            before = covers.pop()
            local -= before.stop - before.start
            first, wanted = before.start, before.wanted
        else:
            wanted = ()
        wanted += (Span(local + start - first, local + stop - first),)
        covers.append(Cover(first, end, wanted))
        local, last = local + end - first, stop
    if any(cover.stop % block for cover in covers[:-1]):
        raise LayoutError(
            f"a rank would hold the last indices of an axis of {axis_length}, which are no whole"
            f" block of {block}, before others"
        )
    return tuple(covers)


def num_indices(spans: Iterable[Span]) -> int:
    """How many indices the spans hold."""
    return sum(stop - start for start, stop in spans)


def cover_axis(by_rank: Sequence[Sequence[Span]], axis_length: int) -> tuple[Tile, ...]:
    """The axis in order, each stretch from the first rank that holds it.

    Raises LayoutError if an index is held by no rank.
    """
    pieces: list[Tile] = []
    for tp_rank, spans in enumerate(by_rank):
        local = 0
        for start, stop in spans:
            pieces.append(Tile(start, stop, tp_rank, local))
            local += stop - start
    covered, tiles = 0, []
    for piece in sorted(pieces, key=lambda p: (p.start, p.tp_rank, p.local)):
        if piece.start > covered:
            break
        if piece.stop > covered:
            local = piece.local + covered - piece.start
            tiles.append(Tile(covered, piece.stop, piece.tp_rank, local))
            covered = piece.stop
    if covered != axis_length:
        raise LayoutError(f"the ranks hold indices up to {covered} of an axis of {axis_length}")
    return tuple(tiles)
