"""Where a rank's part of an axis lies: integers only.

A shard is a list of spans of one axis.  An axis is read as sections, one after another, and each
section as an array `[repeat, units, size]` whose middle dimension is divided over the ranks:

    llama q_proj         [q0 q1 … q31]                    Section(units=32, size=128)
    gpt2 c_attn          [Q | K | V]                      Section(units=12, size=64, repeat=3)
    gpt_neox qkv         [q0 k0 v0 | q1 k1 v1 | …]        Section(units=32, size=3 * 128)
    phi3 qkv             [Q | K | V], fewer K and V       three sections
    llama k_proj         [k0 … k7], shared by 32 heads    Section(units=8, size=128, sharers=32)
    falcon qkv           [q0 q1 k0 v0 | q2 q3 k1 v1 | …]  Section(2, 64, sharers=4, beside=2)

Units are dealt out evenly, the first ranks holding one more where they do not divide: 9 heads over
2 ranks are 5 + 4.  Units that others share (kv heads, shared by query heads) follow their sharers:

    split       each rank holds its own units              8 kv heads of 32 over 4: 2 each
    replicate   ranks hold the units their sharers use     2 kv heads of 8 over 4: k0 k0 k1 k1
    expand      one copy per local sharer, where ranks     2 kv heads of 14 over 4: k0 k0 k0 k0,
                would hold unequal ratios otherwise        k0 k0 k0 k1, k1 k1 k1, k1 k1 k1
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from shardkit.errors import LayoutError

KvHeadMode = Literal["split", "replicate", "expand"]
MAX_SPANS = 4096  # of one axis on one rank: far above any real layout, and soon counted


class Span(NamedTuple):
    """A half-open range [start, stop) of indices along one axis."""

    start: int
    stop: int


class Tile(NamedTuple):
    """A stretch [start, stop) of an axis, and where a rank keeps it: from `local` of its shard."""

    start: int
    stop: int
    tp_rank: int
    local: int


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of an axis read as `[repeat, units, size]`; the units are divided over the ranks.

    `shared_by` is the number of units of another kind that share these (query heads sharing kv
    heads); 0 where nothing does.  `replicated` keeps the section on every rank.  With `group_tail`, the
    axis is `[repeat, units, sharers/units + beside, size]`: each unit's sharers, then as many
    indices of its own, which go wherever one of the sharers does.
    """

    units: int
    size: int
    repeat: int = 1
    shared_by: int = 0
    replicated: bool = False
    group_tail: int = 0

    @property
    def indices_per_unit(self) -> int:
        """How many indices one unit takes."""
        return (
            self.shared_by // self.units + self.group_tail if self.group_tail else 1
        ) * self.size

    def __len__(self) -> int:
        return self.repeat * self.units * self.indices_per_unit


def partition(units: int, tp_rank: int, tp_size: int) -> range:
    """The units `tp_rank` holds when they are dealt out evenly, the first ranks one more.

    Raises LayoutError where a rank would be left without a unit.
    """
    if units < tp_size:
        raise LayoutError(
            f"{units} units cannot be divided over tp_size {tp_size}; possible: 1 to {units}"
        )
    each, over = divmod(units, tp_size)
    start = tp_rank * each + min(tp_rank, over)
    return range(start, start + each + (tp_rank < over))


@lru_cache
def kv_head_mode(units: int, sharers: int, tp_size: int) -> KvHeadMode:
    """How `units` follow the units that share them over `tp_size` ranks.

    Raises LayoutError where the sharers are no multiple of the units, or fewer than the ranks.
    """
    if sharers % units:
        raise LayoutError(f"{sharers} units cannot share {units}: not a multiple")
    if units % tp_size == 0:
        return "split"
    ratio = sharers // units
    own = (partition(sharers, tp_rank, tp_size) for tp_rank in range(tp_size))
    return "replicate" if all(len(_heads_per_unit(o, ratio)) == 1 for o in own) else "expand"


def held_units(section: Section, tp_rank: int, tp_size: int) -> tuple[Span, ...]:
    """The units of a section that `tp_rank` holds, in order; repeated where it holds copies."""
    if section.replicated:
        return (Span(0, section.units),)
    if not section.shared_by:
        own = partition(section.units, tp_rank, tp_size)
        return (Span(own.start, own.stop),)
    mode, ratio = (
        kv_head_mode(section.units, section.shared_by, tp_size),
        section.shared_by // section.units,
    )
    own = partition(section.shared_by, tp_rank, tp_size)
    if mode == "expand":
        return coalesce(Span(sharer // ratio, sharer // ratio + 1) for sharer in own)
    return (Span(own[0] // ratio, own[-1] // ratio + 1),)


def rank_spans(sections: Sequence[Section], tp_rank: int, tp_size: int) -> tuple[Span, ...]:
    """The spans of the axis that `tp_rank` holds, in the order it stores them.

    Raises LayoutError where a rank would be left without a unit, or hold too many spans.
    """
    if (
        most := sum(s.repeat * max(s.shared_by << bool(s.group_tail), 1) for s in sections)
    ) > MAX_SPANS:
        raise LayoutError(f"an axis of {most} stretches, more than the {MAX_SPANS} allowed")
    found: list[Span] = []
    offset = 0
    for section in sections:
        parts = _grouped_spans(section, tp_rank, tp_size) if section.group_tail else None
        units = parts or [
            Span(first * section.size, last * section.size)
            for first, last in held_units(section, tp_rank, tp_size)
        ]
        for block in range(section.repeat):
            base = offset + block * section.units * section.indices_per_unit
            found += (Span(base + first, base + last) for first, last in units)
        offset += len(section)
    return coalesce(found)


def coalesce(parts: Iterable[Span]) -> tuple[Span, ...]:
    """The same indices in the same order, neighbours joined and empty spans dropped."""
    result: list[Span] = []
    for part in parts:
        if part.start == part.stop:
            continue
        if result and result[-1].stop == part.start:
            result[-1] = Span(result[-1].start, part.stop)
        else:
            result.append(part)
    return tuple(result)


def num_indices(parts: Iterable[Span]) -> int:
    """How many indices the spans hold."""
    return sum(stop - start for start, stop in parts)


def cover_axis(by_rank: Sequence[Sequence[Span]], axis_length: int) -> tuple[Tile, ...]:
    """The axis in order, each stretch from the first rank that holds it.

    Raises LayoutError where an index is held by no rank.
    """
    pieces: list[Tile] = []
    for tp_rank, parts in enumerate(by_rank):
        local = 0
        for start, stop in parts:
            pieces.append(Tile(start, stop, tp_rank, local))
            local += stop - start
    covered, tiles = 0, []
    for piece in sorted(pieces, key=lambda p: (p.start, p.tp_rank, p.local)):
        if piece.start > covered:
            break
        if piece.stop > covered:
            tiles.append(
                Tile(covered, piece.stop, piece.tp_rank, piece.local + covered - piece.start)
            )
            covered = piece.stop
    if covered != axis_length:
        raise LayoutError(f"the ranks hold indices up to {covered} of an axis of {axis_length}")
    return tuple(tiles)


def _grouped_spans(section: Section, tp_rank: int, tp_size: int) -> list[Span]:
    """A rank's spans of one block of a section whose units lie beside their sharers.

    Where units are expanded, each local sharer comes with a copy of its own.
    """
    ratio, size = section.shared_by // section.units, section.size
    own = partition(section.shared_by, tp_rank, tp_size)
    expand = kv_head_mode(section.units, section.shared_by, tp_size) == "expand"
    sets = [range(s, s + 1) for s in own] if expand else _split_by_unit(own, ratio)
    found = []
    for sharers in sets:
        unit = sharers.start // ratio
        start, end = unit * section.indices_per_unit, (unit + 1) * section.indices_per_unit
        first = start + (sharers.start - unit * ratio) * size
        found += [
            Span(first, first + len(sharers) * size),
            Span(end - section.group_tail * size, end),
        ]
    return found


def _split_by_unit(own: range, ratio: int) -> list[range]:
    """A rank's sharers, those of one unit together."""
    units = range(own.start // ratio, (own.stop - 1) // ratio + 1)
    return [range(max(own.start, u * ratio), min(own.stop, (u + 1) * ratio)) for u in units]


def _heads_per_unit(own: range, ratio: int) -> set[int]:
    """By how many of a rank's sharers each unit is used: one number where all are used alike."""
    first, last = own[0] // ratio, own[-1] // ratio
    if first == last:
        return {len(own)}
    ends = {(first + 1) * ratio - own.start, own.stop - last * ratio}
    return ends | {ratio} if last - first > 1 else ends
