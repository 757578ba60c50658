"""A plan's tensors grouped by layout, and their bytes. Arithmetic only; nothing is read."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import mul

from shardkit.layout import Section, kv_head_mode
from shardkit.planning.layout_plan import Plan
from shardkit.planning.mesh import Mesh
from shardkit.planning.placement import Placement
from shardkit.planning.placement_table import PlacementGroup, PlacementTable
from shardkit.recipe import compile_module_pattern
from shardkit.tensor import TensorSpec

NUMBER = re.compile(r"\d{1,9}|\*")
MAX_RUNS = 6


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one layout whose names differ by numbers only.

    Attributes:
        pattern: Their names as one: `layers.{0..79}.mlp.up_proj.weight`.
        count: How many they are.
        example: The placement of the first.
        counts: How many of them each rank stores.
        shards: What a rank stores of one of them.
        treatment: What becomes of each: `split`, `replicated`, or something between.
    """

    pattern: str
    count: int
    example: Placement
    counts: tuple[int, ...]
    shards: tuple[TensorSpec | None, ...]
    treatment: str

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """What each rank stores of all of them, in bytes."""
        each = (shard.nbytes if shard else 0 for shard in self.shards)
        return tuple(map(mul, self.counts, each))


@dataclass(frozen=True, slots=True)
class Imbalance:
    """How far the largest rank is above the mean, in bytes that are loaded.

    Attributes:
        ratio: The largest rank's bytes over the mean.
        largest: That rank.
        cause: The group that adds most to it; None if every rank loads as much.
    """

    ratio: float
    largest: int
    cause: TensorGroup | None


@dataclass(frozen=True)
class PlanSummary:
    """A plan's groups, in the order in which they first appear, and sums over them."""

    plan: Plan
    groups: tuple[TensorGroup, ...]

    @cached_property
    def stored_bytes(self) -> tuple[int, ...]:
        """The tensor bytes in each rank's file."""
        return _add_rows((group.rank_bytes for group in self.groups), self.plan.mesh.world_size)

    @cached_property
    def loaded_bytes(self) -> tuple[int, ...]:
        """The weights in each rank's memory, as stored.

        What only a merge needs is not loaded, nor what no quantized weight is computed from.
        """
        loaded = (group.rank_bytes for group in self.groups if self._is_loaded(group))
        total = _add_rows(loaded, self.plan.mesh.world_size)
        dropped = _count_dropped_bytes(self.plan)
        return tuple(a - b for a, b in zip(total, dropped, strict=True))

    @property
    def total_bytes(self) -> int:
        """The tensor bytes of the unsharded checkpoint."""
        return sum(group.count * group.example.spec.nbytes for group in self.groups)

    @property
    def replicated_bytes(self) -> int:
        """The bytes that are stored more than once, each further copy counted."""
        return sum(self.stored_bytes) - self.total_bytes

    @property
    def imbalance(self) -> Imbalance:
        """The largest rank against the mean, and the group that adds most to the difference."""
        loaded = self.loaded_bytes
        largest = loaded.index(max(loaded))
        if min(loaded) == max(loaded):
            return Imbalance(1.0, largest, None)

        def excess(group: TensorGroup) -> int:
            nbytes = group.rank_bytes if self._is_loaded(group) else (0,) * len(loaded)
            return nbytes[largest] * len(nbytes) - sum(nbytes)

        ratio = loaded[largest] * len(loaded) / sum(loaded)
        return Imbalance(ratio, largest, max(self.groups, key=excess))

    def _is_loaded(self, group: TensorGroup) -> bool:
        unused = self.plan.grouping.unused
        return group.example.is_loaded and group.example.spec.name not in unused


def summarize_plan(plan: Plan) -> PlanSummary:
    """Group a plan's tensors by layout."""
    alike: dict[object, list[PlacementGroup]] = {}
    for group in plan.groups:
        tensors, layout = group.tensors, replace(group.layout, expert=None)
        count = group.layout.expert and group.layout.expert.count
        key = (tensors.pattern, tensors.dtype, tensors.shape, layout, count)
        alike.setdefault(key, []).append(group)
    return PlanSummary(plan, tuple(_make_group(groups, plan.mesh) for groups in alike.values()))


def _make_group(groups: Sequence[PlacementGroup], mesh: Mesh) -> TensorGroup:
    """Tensors of one layout, or of one for each expert of theirs."""
    first, names = groups[0].first, [name for group in groups for name in group.tensors.names]
    counts = (len(names),) * mesh.world_size
    shards = tuple(first.shard_spec(rank) for rank in mesh.ranks())
    if first.expert is not None:
        counts = tuple(sum(g.count for g in groups if g.first.spans(r)) for r in mesh.ranks())
        shards = (first.spec,) * mesh.world_size
    treatment = describe_treatment(first, mesh)
    return TensorGroup(collapse_names(names), len(names), first, counts, shards, treatment)


def list_unloaded(plan: Plan) -> tuple[str, ...]:
    """The tensors that the model's class has no place for; not those that a rule ignores."""
    names = {
        name
        for group in plan.groups
        if group.layout.style.is_loaded and not group.layout.in_model
        for name in group.tensors.names
    }
    return tuple(filter(names.__contains__, PlacementTable.of(plan.placements).names))


def collapse_names(names: Sequence[str]) -> str:
    """Names that differ by numbers only, as one: `layers.{0..79}.mlp.up_proj.weight`."""
    words = names[0].split(".")
    is_number = [NUMBER.fullmatch(word) is not None for word in words]
    pairs = list(zip(words, is_number, strict=True))
    form = r"\.".join(r"([^.\n]*)" if number else re.escape(word) for word, number in pairs)
    # One call for all names: to split them one by one takes three times as long.
    rows = re.findall(f"^{form}()$", "\n".join(names), re.MULTILINE)
    columns = iter(map(set, zip(*rows, strict=True)))
    return ".".join(_join_words(next(columns)) if number else word for word, number in pairs)


def describe_treatment(placement: Placement, mesh: Mesh) -> str:
    """What becomes of a tensor over a mesh, in a word or two."""
    if placement.expert is not None:
        return "whole"
    if placement.dim is None:
        return "replicated" if placement.is_loaded else "rank 0 only"
    modes = {
        kv_head_mode(s.units, s.shared_by, mesh.tp_size, s.block)
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


def describe_units(plan: Plan, placement: Placement) -> str:
    """What a tensor is divided by, in the recipe's words: `9 heads`, `3 kv_heads shared by 9`."""
    if placement.expert is not None:
        return f"{placement.expert.count} experts"
    divided = [section for section in placement.sections if not section.replicated]
    return " + ".join(_describe_section(plan, placement, section) for section in divided)


def find_blocking_tensor(plan: Plan) -> str | None:
    """The tensor that allows no more than `plan.max_tp_size` ranks; None if nothing is divided."""
    for placement in (group.first for group in plan.groups):
        limits = [s.max_tp_size for s in placement.sections if not s.replicated]
        limits += [placement.expert.count] if placement.expert is not None else []
        if limits and min(limits) == plan.max_tp_size:
            return placement.spec.name
    return None


def _describe_section(plan: Plan, placement: Placement, section: Section) -> str:
    name = plan.name_unit(placement, section.units, section.shared_by)
    others = f" shared by {section.shared_by}" if section.shared_by else ""
    return f"{section.units} {name}{others}"


def _join_words(words: set[str]) -> str:
    """One part of some names: a word, or numbers; names may have `*` for one of them."""
    if len(words) == 1:
        return words.pop()
    if not all(map(str.isdecimal, words)):
        return "{" + ",".join(sorted(words)) + "}"
    return _format_ranges(set(map(int, words)))


def _format_ranges(numbers: set[int]) -> str:
    """`7`, `{0..79}`, `{0..2,5}`, or if there are many gaps `{0..78: 40}`."""
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


def _count_dropped_bytes(plan: Plan) -> tuple[int, ...]:
    """What each rank reads of lists of modules, one for each unit, and does not keep."""
    dropped = [0] * plan.mesh.world_size
    for rule in plan.module_attributes:
        name = rule.attribute.removesuffix("?")
        if rule.is_counted_by_tensor or rule.per_unit or plan.units[rule.unit].count is None:
            continue
        within = re.compile(
            compile_module_pattern(rule.module).pattern + rf"\.{re.escape(name)}\.(\d{{1,9}})\..*"
        )
        for group in plan.groups:
            layout = group.layout
            if f".{name}." not in group.tensors.pattern or layout.dim is not None:
                continue
            matches = filter(None, map(within.fullmatch, group.tensors.names))
            numbers = [int(match[1]) for match in matches if layout.is_loaded]
            for rank in plan.mesh.ranks() if numbers else ():
                spans = plan.local_spans(rule.unit, rank)
                kept = sum(any(start <= n < stop for start, stop in spans) for n in numbers)
                dropped[rank.index] += (len(numbers) - kept) * group.first.spec.nbytes
    return tuple(dropped)


def _add_rows(rows: Iterable[Sequence[int]], width: int) -> tuple[int, ...]:
    total = [0] * width
    for row in rows:
        total = [a + b for a, b in zip(total, row, strict=True)]
    return tuple(total)
