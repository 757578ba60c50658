"""A plan's tensors in groups of one layout, and their bytes.  Arithmetic only; nothing is read."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardkit.layout.spans import Section, kv_head_mode
from shardkit.planning.plan import Placement, Plan
from shardkit.tensor import TensorSpec

NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")
MAX_RUNS = 6


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one layout whose names differ by numbers only.

    `example` is the first of them; `shards` is what each rank stores of one.
    """

    pattern: str
    count: int
    example: Placement
    shards: tuple[TensorSpec | None, ...]

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """What each rank stores of all of them, in bytes."""
        return tuple(self.count * (shard.nbytes if shard else 0) for shard in self.shards)

    @property
    def treatment(self) -> str:
        """What becomes of each of them: split, replicated, or in between."""
        return describe_treatment(self.example, len(self.shards))


@dataclass(frozen=True, slots=True)
class Imbalance:
    """How far the largest rank is above the mean, in bytes that are loaded.

    `cause` is the group that adds most to it; None where every rank loads as much.
    """

    ratio: float
    largest: int
    cause: TensorGroup | None


def group_by_layout(plan: Plan) -> tuple[TensorGroup, ...]:
    """The plan's tensors, those of one layout together, in the order they first appear."""
    alike: dict[object, list[Placement]] = {}
    for p in plan.placements:
        key = (NUMBER.sub("#", p.spec.name), p.spec.dtype, p.spec.shape, p.style, p.dim, p.sections)
        alike.setdefault(key, []).append(p)
    ranks = range(plan.tp_size)
    return tuple(
        TensorGroup(
            collapse_names([p.spec.name for p in same]),
            len(same),
            same[0],
            tuple(same[0].shard_spec(tp_rank, plan.tp_size) for tp_rank in ranks),
        )
        for same in alike.values()
    )


def collapse_names(names: Sequence[str]) -> str:
    """Names that differ by numbers only, as one: `layers.{0..79}.mlp.up_proj.weight`."""
    columns = zip(*(map(int, NUMBER.findall(name)) for name in names), strict=True)
    shown = (_format_ranges(set(column)) for column in columns)
    return NUMBER.sub(lambda _: next(shown), names[0])


def describe_treatment(placement: Placement, tp_size: int) -> str:
    """What becomes of a tensor over `tp_size` ranks, in a word or two."""
    if placement.dim is None:
        return "rank 0 only" if placement.style == "ignore" else "replicated"
    modes = {
        kv_head_mode(s.units, s.shared_by, tp_size)
        for s in placement.sections
        if s.shared_by and not s.replicated
    }
    if "expand" in modes:
        return "kv-expanded"
    if "replicate" in modes:
        return "kv-replicated"
    if any(section.replicated for section in placement.sections):
        return "partly replicated"
    return "split"


def count_stored_bytes(parts: Iterable[TensorGroup], tp_size: int) -> tuple[int, ...]:
    """The tensor bytes in each rank's file."""
    return _add_rows((group.rank_bytes for group in parts), tp_size)


def count_loaded_bytes(parts: Iterable[TensorGroup], tp_size: int) -> tuple[int, ...]:
    """The weights in each rank's memory, as stored: what is kept for a merge only is not loaded."""
    held = (group.rank_bytes for group in parts if group.example.style != "ignore")
    return _add_rows(held, tp_size)


def count_total_bytes(plan: Plan) -> int:
    """The tensor bytes of the unsharded checkpoint."""
    return sum(placement.spec.nbytes for placement in plan.placements)


def count_replicated_bytes(plan: Plan, parts: Iterable[TensorGroup]) -> int:
    """The bytes that are stored more than once, each further copy counted."""
    return sum(count_stored_bytes(parts, plan.tp_size)) - count_total_bytes(plan)


def measure_imbalance(plan: Plan, parts: Sequence[TensorGroup]) -> Imbalance:
    """The largest rank against the mean, and the group that adds most to the difference."""
    loaded = count_loaded_bytes(parts, plan.tp_size)
    largest = loaded.index(max(loaded))
    if min(loaded) == max(loaded):
        return Imbalance(1.0, largest, None)

    def excess(group: TensorGroup) -> int:
        held = group.rank_bytes
        return held[largest] * len(held) - sum(held) if group.example.style != "ignore" else 0

    return Imbalance(loaded[largest] * len(loaded) / sum(loaded), largest, max(parts, key=excess))


def describe_units(plan: Plan, placement: Placement) -> str:
    """What a tensor is divided by, in the recipe's words: `9 heads`, `3 kv_heads shared by 9`."""
    return " + ".join(
        _unit_name(plan, placement, s) for s in placement.sections if not s.replicated
    )


def find_blocking_tensor(plan: Plan) -> str | None:
    """The tensor that allows no more than `plan.max_tp_size` ranks; None if nothing is divided."""
    for placement in plan.placements:
        counts = [s.shared_by or s.units for s in placement.sections if not s.replicated]
        if counts and min(counts) == plan.max_tp_size:
            return placement.spec.name
    return None


def _unit_name(plan: Plan, placement: Placement, section: Section) -> str:
    counted = (section.units, section.shared_by)
    exact = [name for name, unit in plan.units.items() if (unit.count, unit.shared_by) == counted]
    any_count = [name for name, unit in plan.units.items() if not unit.count and name != "vocab"]
    names = ["vocab"] if placement.style == "vocab" else exact or any_count
    name = names[0] if len(names) == 1 else "units"
    return f"{section.units} {name}" + (
        f" shared by {section.shared_by}" if section.shared_by else ""
    )


def _format_ranges(numbers: set[int]) -> str:
    """`7`, `{0..79}`, `{0..2,5}`, or where there are many gaps `{0..78: 40}`."""
    if len(numbers) == 1:
        return str(numbers.pop())
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    if len(runs) > MAX_RUNS:
        return f"{{{runs[0][0]}..{runs[-1][-1]}: {len(numbers)}}}"
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"


def _add_rows(rows: Iterable[Sequence[int]], width: int) -> tuple[int, ...]:
    total = [0] * width
    for row in rows:
        total = [a + b for a, b in zip(total, row, strict=True)]
    return tuple(total)
