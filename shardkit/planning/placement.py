"""A plan: where every tensor lies on every rank, before any weight is read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from shardkit.checkpoint import find_wrapper_prefix
from shardkit.errors import LayoutError, RecipeError
from shardkit.layout import (
    Section,
    Span,
    Style,
    Tile,
    Unit,
    cover_axis,
    num_indices,
    rank_spans,
    resolve_sections,
)
from shardkit.planning.loading import decide_loading, is_stated
from shardkit.planning.mesh import MAX_TP_SIZE, Mesh, Rank
from shardkit.planning.unknown_tensors import describe_unknown_tensor
from shardkit.recipe import (
    ForwardArgument,
    ModuleAttribute,
    Recipe,
    compose_recipe,
    resolve_counts,
    resolve_units,
)
from shardkit.tensor import TensorSpec, byte_view


@dataclass(frozen=True)
class Placement:
    """One tensor's layout, over any mesh.

    Attributes:
        spec: The whole tensor.
        style: How ranks share it.
        dim: The dimension that is divided; None if none is.
        sections: What `dim` holds. If the style gathers inputs, what the input's last dimension
            holds, though the tensor itself is replicated.
        in_model: Whether the model's class has a place for it.
        units: The names of the units that its rule divides; none if it is read from a manifest.
    """

    spec: TensorSpec
    style: Style
    dim: int | None = None
    sections: tuple[Section, ...] = ()
    in_model: bool = True
    units: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_loaded(self) -> bool:
        """Whether a rank loads it; what is not loaded is stored for a merge."""
        return self.style.is_loaded and self.in_model

    def spans(self, rank: Rank) -> tuple[Span, ...]:
        """The spans of `dim` that a rank holds; of one undivided row if `dim` is None."""
        if self.dim is not None:
            return rank_spans(self.sections, rank.tp_rank, rank.mesh.tp_size)
        return (Span(0, 1),) if self.is_loaded or rank.is_first else ()

    def section_lengths(self, rank: Rank) -> tuple[int, ...]:
        """How much of each section of `dim` a rank holds; empty if nothing is divided."""
        if self.dim is None:
            return ()
        parts = (rank_spans((s,), rank.tp_rank, rank.mesh.tp_size) for s in self.sections)
        return tuple(map(num_indices, parts))

    def shard_spec(self, rank: Rank) -> TensorSpec | None:
        """What a rank stores under the tensor's name; None if it stores nothing."""
        spans = self.spans(rank)
        if self.dim is None:
            return self.spec if spans else None
        shape = list(self.spec.shape)
        shape[self.dim] = num_indices(spans)
        return replace(self.spec, shape=tuple(shape))

    def destinations(self, mesh: Mesh) -> tuple[tuple[int, tuple[Span, ...]], ...]:
        """The ranks that store a part of it, by index, and the spans that each stores."""
        parts = ((rank.index, self.spans(rank)) for rank in mesh.ranks())
        return tuple((index, spans) for index, spans in parts if spans or self.dim is not None)

    def tiles(self, mesh: Mesh) -> tuple[Tile, ...]:
        """The divided dimension in order, each stretch from the first rank that holds it."""
        by_rank = [self.spans(rank) for rank in mesh.ranks()]
        return cover_axis(by_rank, byte_view(self.spec, self.dim).axis)


@dataclass(frozen=True)
class Plan:
    """Every tensor's placement over a mesh, and what else is smaller on a rank.

    Attributes:
        mesh: The ranks.
        placements: Every tensor's, in the order of the source's files.
        units: What is divided, counted.
        module_attributes: Attributes of the model's modules that count units.
        forward_arguments: Arguments of the model's modules that hold units.
        model_class: The class of transformers that the checkpoint is of; empty for the one that
            config.json names.
        wrapper_prefix: What training wrappers put before every tensor's name; empty if nothing.
    """

    mesh: Mesh
    placements: tuple[Placement, ...]
    units: Mapping[str, Unit]
    module_attributes: tuple[ModuleAttribute, ...] = ()
    forward_arguments: tuple[ForwardArgument, ...] = ()
    model_class: str = ""
    wrapper_prefix: str = ""

    @property
    def tp_size(self) -> int:
        """The number of tensor-parallel ranks."""
        return self.mesh.tp_size

    def with_tp_size(self, tp_size: int) -> "Plan":
        """The same layout over another number of ranks: 1 for a merge. Raises LayoutError."""
        plan = replace(self, mesh=Mesh(tp_size))
        plan.check()
        return plan

    def check(self) -> None:
        """Raise LayoutError, naming the tensor in the way, unless every rank can hold its part."""
        self.mesh.check()
        if self.tp_size > self.max_tp_size:
            raise LayoutError(self._describe_limit())
        for placement in _list_layouts(self.placements):
            byte_view(placement.spec, placement.dim)
            try:
                placement.tiles(self.mesh)
            except LayoutError as error:
                raise LayoutError(f"{placement.spec.name}: {error}") from None

    @cached_property
    def loaded_by_style(self) -> Mapping[str, Sequence[Placement]]:
        """The loaded tensors by the name of their style."""
        by_style: dict[str, list[Placement]] = {}
        for placement in self.placements:
            if placement.is_loaded:
                by_style.setdefault(placement.style.name, []).append(placement)
        return by_style

    @cached_property
    def paths_by_style(self) -> dict[str, list[list[str]]]:
        """The names of a style's tensors, cut at their dots, as far as they were asked for."""
        return {}

    @cached_property
    def max_tp_size(self) -> int:
        """The most ranks that each still hold a unit of everything that is divided."""
        limits = [
            section.max_tp_size
            for placement in self.placements
            if placement.dim is not None
            for section in placement.sections
            if not section.replicated
        ]
        return min(limits, default=MAX_TP_SIZE)

    def _describe_limit(self) -> str:
        """Why there are too many ranks: of which tensor there is not a unit for each."""
        most = self.max_tp_size
        for p in self.placements:
            for section in p.sections if p.dim is not None else ():
                if section.max_tp_size == most and not section.replicated:
                    what = self.name_unit(p, section.shared_by or section.units, 0)
                    return (
                        f"{p.spec.name}: {most} {what} cannot be divided over tp_size"
                        f" {self.tp_size}; this checkpoint divides over tp_size 1 to {most}"
                    )
        return f"tp_size {self.tp_size} is not 1 to {most}"

    def name_unit(self, placement: Placement, count: int, shared_by: int) -> str:
        """What the recipe calls a unit of a tensor, told by its counts; else just units."""
        counts = (count, shared_by)
        exact = [
            name for name, unit in self.units.items() if (unit.count, unit.shared_by) == counts
        ]
        any_count = [
            name for name, unit in self.units.items() if not unit.count and name != "vocab"
        ]
        names = ["vocab"] if placement.style.axis == "vocab" else exact or any_count
        stated = [name for name in names if name in placement.units] or names
        return stated[0] if len(stated) == 1 else "units"

    def local_spans(self, unit: str, rank: Rank) -> tuple[Span, ...]:
        """The units of a kind that a rank holds. Raises LayoutError if the unit has no count."""
        counted = self.units[unit]
        if counted.count is None:
            raise LayoutError(f"unit {unit!r} has no count in the config")
        section = Section(counted.count, 1, 1, counted.shared_by)
        return rank_spans([section], rank.tp_rank, rank.mesh.tp_size)

    def count_local_units(self, unit: str, rank: Rank) -> int:
        """How many units of a kind a rank holds, copies counted. Raises LayoutError."""
        return num_indices(self.local_spans(unit, rank))


def _list_layouts(placements: Iterable[Placement]) -> list[Placement]:
    """The first placement of each layout: experts by the ten thousand have one in common."""
    layouts: dict[object, Placement] = {}
    for p in placements:
        key = (p.spec.dtype, p.spec.shape, p.style.name, p.dim, p.sections, p.in_model)
        layouts.setdefault(key, p)
    return [*layouts.values()]


def make_plan(
    specs: Iterable[TensorSpec], recipe: Recipe, config: Mapping[str, Any], tp_size: int
) -> Plan:
    """Place every tensor by the one rule that names it.

    Args:
        specs: Every tensor, in the order in which the source's files hold them.
        recipe: The rules.
        config: The source's config.json.
        tp_size: The number of ranks.

    Raises:
        RecipeError: For a tensor that no rule names, or two rules name.
        LayoutError: For a `tp_size` that cannot work.
        CheckpointError: If the checkpoint lacks a head that the class in its config needs.
    """
    recipe, whole = compose_recipe(recipe, config), tuple(specs)
    prefix = find_wrapper_prefix([spec.name for spec in whole])
    units, counts = resolve_units(recipe, config), resolve_counts(recipe, config)
    try:
        placements = [*_place_tensors(whole, recipe, units, counts, prefix)]
    except RecipeError:
        if fault := describe_unknown_tensor([spec.name for spec in whole], recipe, prefix):
            raise RecipeError(fault) from None
        raise
    names = [spec.name.removeprefix(prefix) for spec in whole]
    shapes = {name: spec.shape for name, spec in zip(names, whole, strict=True)}
    loaded = decide_loading(config, shapes)
    unloaded = loaded.unloaded.union(filter(recipe.find_prediction_module, names))
    plan = Plan(
        Mesh(tp_size),
        tuple(
            replace(placement, in_model=False) if name in unloaded else placement
            for placement, name in zip(placements, names, strict=True)
        ),
        units,
        recipe.module_attributes,
        recipe.forward_arguments,
        "" if is_stated(loaded.model_class, config) else loaded.model_class,
        prefix,
    )
    plan.check()
    return plan


def _place_tensors(
    specs: Iterable[TensorSpec],
    recipe: Recipe,
    units: Mapping[str, Unit],
    counts: Mapping[str, int],
    prefix: str,
) -> Iterator[Placement]:
    """Every tensor's placement; those of one name but for its numbers, and one shape, are alike."""
    alike: dict[tuple[str, tuple[int, ...]], Placement] = {}
    for spec in specs:
        key = recipe.generalize(spec.name), spec.shape
        if (first := alike.get(key)) is None:
            first = alike[key] = place_tensor(spec, recipe, units, counts, prefix)
        yield Placement(spec, first.style, first.dim, first.sections, units=first.units)


def place_tensor(
    spec: TensorSpec,
    recipe: Recipe,
    units: Mapping[str, Unit],
    counts: Mapping[str, int] | None = None,
    wrapper_prefix: str = "",
) -> Placement:
    """One tensor's placement, by the rule for its name without a prefix. Raises RecipeError."""
    rule = recipe.rule_for(spec.name.removeprefix(wrapper_prefix))
    ndim = len(spec.shape)
    dim = rule.dim(spec.shape, counts or {})
    axis = dim
    if rule.terms and rule.style.divides == "nothing" and ndim:
        axis = ndim - 1  # what is gathered is the input, which is as wide as the tensor
    if axis is None:
        return Placement(spec, rule.style)
    try:
        sections = resolve_sections(rule.terms, spec.shape[axis], units, counts)
    except RecipeError as error:
        raise RecipeError(f"{spec.name}: {error}") from None
    names = tuple(dict.fromkeys(term.unit for term in rule.terms if term.unit))
    return Placement(spec, rule.style, dim, sections, units=names)
