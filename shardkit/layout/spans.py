"""Where a rank's part of an axis lies: integers only.

A shard is a list of spans of one axis. An axis is read as sections, one after another, and each
section as an array `[repeat, units, size]` whose middle dimension is divided over the ranks:

    llama q_proj         [q0 q1 … q31]                    Section(units=32, size=128)
    gpt2 c_attn          [Q | K | V]                      Section(units=12, size=64, repeat=3)
    gpt_neox qkv         [q0 k0 v0 | q1 k1 v1 | …]        Section(units=32, size=3 * 128)
    phi3 qkv             [Q | K | V], fewer K and V       three sections
    llama k_proj         [k0 … k7], for 32 query heads    Section(units=8, size=128, shared_by=32)
    falcon qkv           [q0 q1 k0 v0 | q2 q3 k1 v1 | …]  Section(2, 64, shared_by=4, group_tail=2)

Units are partitioned as `torch.tensor_split` does: the first ranks get one more if they do not
divide, so 9 heads over 2 ranks are 5 + 4. Units that other units share (kv heads, shared by query
heads) follow them, in one of three modes; vLLM and SGLang know the first two:

    split       each rank holds its own units              8 kv heads of 32 over 4: 2 each
    replicate   ranks hold the units their heads use       2 kv heads of 8 over 4: k0 k0 k1 k1
    expand      one copy per local query head, if ranks    2 kv heads of 14 over 4: k0 k0 k0 k0,
                would hold unequal ratios otherwise        k0 k0 k0 k1, k1 k1 k1, k1 k1 k1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from shardkit.errors import LayoutError
from shardkit.layout.stretches import Span, coalesce

KvHeadMode = Literal["split", "replicate", "expand"]
MAX_SPANS = 4096  # of one axis on one rank: far above any real layout, and quick to count


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of an axis read as `[repeat, units, size]`; the units are divided over the ranks.

    Attributes:
        units: How many units there are in each repeat.
        size: The indices of one unit.
        repeat: How many times the units follow one another: 3 for Q, K and V as blocks.
        shared_by: The number of units of another kind that share these (query heads sharing kv
            heads); 0 if none do.
        replicated: Whether every rank holds the whole section.
        group_tail: If not 0, the axis is `[repeat, units, shared_by / units + group_tail, size]`:
            each unit's group of sharing units, then this many indices of its own, which go with
            every unit of the group.
        block: How many units stay together, the last of them perhaps fewer, if there are as many
            blocks as ranks: a quantized weight is cut between its blocks. If the units are
            shared, it counts those that share them.
    """

    units: int
    size: int
    repeat: int = 1
    shared_by: int = 0
    replicated: bool = False
    group_tail: int = 0
    block: int = 1

    @property
    def group_size(self) -> int:
        """How many units of the other kind share one of these."""
        return self.shared_by // self.units

    @property
    def indices_per_unit(self) -> int:
        """How many indices one unit takes, its group included if that lies in the same axis."""
        return (self.group_size + self.group_tail) * self.size if self.group_tail else self.size

    @property
    def max_spans(self) -> int:
        """The most spans that one rank can hold of it."""
        spans_per_unit = 2 if self.group_tail else 1
        return self.repeat * max(self.shared_by * spans_per_unit, 1)

    @property
    def max_tp_size(self) -> int:
        """The most ranks that each still hold a unit of it."""
        return self.shared_by or self.units

    def __len__(self) -> int:
        return self.repeat * self.units * self.indices_per_unit


def partition(units: int, tp_rank: int, tp_size: int, block: int = 1) -> range:
    """The units that `tp_rank` holds, distributed as `torch.tensor_split` does.

    They go block by block, or if there are fewer blocks than ranks one by one.

    Raises:
        LayoutError: If a rank would be left without a unit.

    Example:
        >>> [len(partition(9, tp_rank, 2)) for tp_rank in range(2)]
        [5, 4]
        >>> [len(partition(1536, tp_rank, 8, block=128)) for tp_rank in (0, 7)]
        [256, 128]
    """
    if units < tp_size:
        raise LayoutError(
            f"{units} units cannot be divided over tp_size {tp_size}; possible: 1 to {units}"
        )
    block = choose_block(units, tp_size, block)
    each, over = divmod(-(-units // block), tp_size)
    start = tp_rank * each + min(tp_rank, over)
    stop = start + each + (tp_rank < over)
    return range(start * block, min(stop * block, units))


def choose_block(units: int, tp_size: int, block: int) -> int:
    """How many of some units stay together: `block`, unless there would be fewer than ranks."""
    return block if -(-units // block) >= tp_size else 1


@lru_cache
def kv_head_mode(kv_heads: int, heads: int, tp_size: int, block: int = 1) -> KvHeadMode:
    """How units follow the units that share them over `tp_size` ranks.

    Args:
        kv_heads: The units that are shared.
        heads: The units that share them.
        tp_size: The number of ranks.
        block: How many of those that share them stay together.

    Raises:
        LayoutError: If `heads` is not a multiple of `kv_heads`, or less than the ranks.
    """
    if heads % kv_heads:
        raise LayoutError(f"{heads} units cannot share {kv_heads}: not a multiple")
    group_size, block = heads // kv_heads, choose_block(heads, tp_size, block)
    is_even = kv_heads % tp_size == 0 and (block == 1 or heads % (block * tp_size) == 0)
    if is_even or block % group_size == 0:
        return "split"
    for tp_rank in range(tp_size):
        if len(_heads_per_kv_head(partition(heads, tp_rank, tp_size, block), group_size)) > 1:
            return "expand"
    return "replicate"


def held_units(section: Section, tp_rank: int, tp_size: int) -> tuple[Span, ...]:
    """The units of a section that `tp_rank` holds, in order; repeated if it holds copies."""
    if section.replicated:
        return (Span(0, section.units),)
    if not section.shared_by:
        units = partition(section.units, tp_rank, tp_size, section.block)
        return (Span(units.start, units.stop),)
    mode = kv_head_mode(section.units, section.shared_by, tp_size, section.block)
    group_size = section.group_size
    heads = partition(section.shared_by, tp_rank, tp_size, section.block)
    if mode == "expand":
        return coalesce(Span(head // group_size, head // group_size + 1) for head in heads)
    return (Span(heads[0] // group_size, heads[-1] // group_size + 1),)


def rank_spans(sections: Sequence[Section], tp_rank: int, tp_size: int) -> tuple[Span, ...]:
    """The spans of the axis that `tp_rank` holds, in the order in which it stores them.

    Raises:
        LayoutError: If a rank would be left without a unit, or hold more than MAX_SPANS spans.

    Example:
        >>> rank_spans([Section(units=4, size=2, repeat=2)], tp_rank=1, tp_size=2)
        (Span(start=4, stop=8), Span(start=12, stop=16))
    """
    if (most := sum(section.max_spans for section in sections)) > MAX_SPANS:
        raise LayoutError(f"an axis of {most} stretches, more than the {MAX_SPANS} allowed")
    spans: list[Span] = []
    offset = 0
    for section in sections:
        local = _block_spans(section, tp_rank, tp_size)
        for block in range(section.repeat):
            base = offset + block * section.units * section.indices_per_unit
            spans += (Span(base + start, base + stop) for start, stop in local)
        offset += len(section)
    return coalesce(spans)


def _block_spans(section: Section, tp_rank: int, tp_size: int) -> list[Span]:
    """A rank's spans of one repeat of a section."""
    if section.group_tail:
        return _grouped_spans(section, tp_rank, tp_size)
    return [
        Span(start * section.size, stop * section.size)
        for start, stop in held_units(section, tp_rank, tp_size)
    ]


def _grouped_spans(section: Section, tp_rank: int, tp_size: int) -> list[Span]:
    """As `_block_spans`, of a section whose units lie in one axis with the units that share them.

    If units are expanded, each local head comes with a copy of its own.
    """
    mode = kv_head_mode(section.units, section.shared_by, tp_size, section.block)
    size, group_size = section.size, section.group_size
    heads = partition(section.shared_by, tp_rank, tp_size, section.block)
    is_expanded = mode == "expand"
    runs = [range(h, h + 1) for h in heads] if is_expanded else _split_by_unit(heads, group_size)
    spans = []
    for run in runs:
        unit = run.start // group_size
        start = unit * section.indices_per_unit
        stop = start + section.indices_per_unit
        first = start + (run.start - unit * group_size) * size
        spans.append(Span(first, first + len(run) * size))
        spans.append(Span(stop - section.group_tail * size, stop))
    return spans


def _split_by_unit(heads: range, group_size: int) -> list[range]:
    """A rank's heads, those of one kv head together."""
    units = range(heads.start // group_size, (heads.stop - 1) // group_size + 1)
    return [
        range(max(heads.start, unit * group_size), min(heads.stop, (unit + 1) * group_size))
        for unit in units
    ]


def _heads_per_kv_head(heads: range, group_size: int) -> set[int]:
    """How many of a rank's heads use each kv head: one number if all are used alike.

    Only a rank's first and last kv head can be used by less than a whole group.
    """
    return {len(run) for run in _split_by_unit(heads, group_size)}
