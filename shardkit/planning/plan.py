"""A plan: where every tensor lies on every rank, before any weight is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shardkit.errors import LayoutError, RecipeError
from shardkit.layout.axis import Unit, resolve_sections
from shardkit.layout.spans import Section, Span, Tile, cover_axis, num_indices, rank_spans
from shardkit.recipe.counts import resolve_counts, resolve_units
from shardkit.recipe.recipe import ForwardArgument, ModuleAttribute, Recipe, Style
from shardkit.tensor import TensorSpec, byte_view

MAX_TP_SIZE = 1024


@dataclass(frozen=True)
class Placement:
    """One tensor's layout, whatever the number of ranks.

    `dim` None: not divided.  Style `ignore`: kept on rank 0 only, for a merge, and never loaded.
    Style `gather`: whole, and the sections are those of the input that its module gathers.
    """

    spec: TensorSpec
    style: Style
    dim: int | None = None
    sections: tuple[Section, ...] = ()

    def spans(self, tp_rank: int, tp_size: int) -> tuple[Span, ...]:
        """The spans of `dim` that `tp_rank` holds; of one undivided row where `dim` is None."""
        if self.dim is not None:
            return rank_spans(self.sections, tp_rank, tp_size)
        return (Span(0, 1),) if tp_rank == 0 or self.style != "ignore" else ()

    def shard_spec(self, tp_rank: int, tp_size: int) -> TensorSpec | None:
        """What `tp_rank` stores under the tensor's name; None where it stores nothing."""
        held = self.spans(tp_rank, tp_size)
        if self.dim is None:
            return self.spec if held else None
        shape = list(self.spec.shape)
        shape[self.dim] = num_indices(held)
        return replace(self.spec, shape=tuple(shape))

    def tiles(self, tp_size: int) -> tuple[Tile, ...]:
        """The sharded dimension in order, each stretch from the first rank that holds it."""
        by_rank = [self.spans(tp_rank, tp_size) for tp_rank in range(tp_size)]
        return cover_axis(by_rank, byte_view(self.spec, self.dim).axis)


@dataclass(frozen=True)
class Plan:
    """Every tensor's placement, over `tp_size` ranks, and what else shrinks on a rank."""

    tp_size: int
    placements: tuple[Placement, ...]
    units: Mapping[str, Unit]
    module_attributes: tuple[ModuleAttribute, ...] = ()
    forward_arguments: tuple[ForwardArgument, ...] = ()

    def with_tp_size(self, tp_size: int) -> "Plan":
        """The same layout over another number of ranks: 1 for a merge.  Raises LayoutError."""
        plan = replace(self, tp_size=tp_size)
        plan.check()
        return plan

    def check(self) -> None:
        """Raise LayoutError, naming the tensor in the way, unless every rank can hold its part."""
        if not 1 <= self.tp_size <= MAX_TP_SIZE:
            raise LayoutError(f"tp_size {self.tp_size} is not 1 to {MAX_TP_SIZE}")
        for placement in self.placements:
            byte_view(placement.spec, placement.dim)
            try:
                placement.tiles(self.tp_size)
            except LayoutError as error:
                most, limit = self.max_tp_size, ""
                if self.tp_size > most:
                    limit = f"; this checkpoint divides over tp_size 1 to {most}"
                raise LayoutError(f"{placement.spec.name}: {error}{limit}") from None

    @cached_property
    def max_tp_size(self) -> int:
        """The most ranks that each still hold a unit of everything that is divided."""
        counts = [
            section.shared_by or section.units
            for placement in self.placements
            if placement.dim is not None
            for section in placement.sections
            if not section.replicated
        ]
        return min(counts, default=MAX_TP_SIZE)

    def count_local_units(self, unit: str, tp_rank: int) -> int:
        """How many units of a kind `tp_rank` holds, copies counted.

        Raises LayoutError for a unit without a count of its own.
        """
        rule = self.units[unit]
        if rule.count is None:
            raise LayoutError(f"unit {unit!r} has no count in the config")
        return num_indices(
            rank_spans([Section(rule.count, 1, 1, rule.shared_by)], tp_rank, self.tp_size)
        )


def make_plan(
    specs: Iterable[TensorSpec], recipe: Recipe, config: Mapping[str, Any], tp_size: int
) -> Plan:
    """Place every tensor by the one rule that names it.

    Raises RecipeError for a tensor no rule or two rules name, and LayoutError for a `tp_size` that
    cannot work.
    """
    units, counts = resolve_units(recipe, config), resolve_counts(recipe, config)
    placements = tuple(place_tensor(spec, recipe, units, counts) for spec in specs)
    plan = Plan(tp_size, placements, units, recipe.module_attributes, recipe.forward_arguments)
    plan.check()
    return plan


def place_tensor(
    spec: TensorSpec,
    recipe: Recipe,
    units: Mapping[str, Unit],
    counts: Mapping[str, int] | None = None,
) -> Placement:
    """One tensor's placement.  Raises RecipeError."""
    rule = recipe.rule_for(spec.name)
    dim = rule.dim(len(spec.shape))
    axis = -1 if rule.style == "gather" and spec.shape else dim
    if axis is None:
        return Placement(spec, rule.style)
    try:
        parts = resolve_sections(rule.terms, spec.shape[axis], units, counts)
    except RecipeError as error:
        raise RecipeError(f"{spec.name}: {error}") from None
    return Placement(spec, rule.style, dim, parts)
