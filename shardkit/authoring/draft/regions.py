"""From dependencies to a parallel region: which axes divide, by which unit, and what counts it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardkit.authoring.draft.dependencies import Dependency, LayerDependencies
from shardkit.authoring.draft.unit_axes import (
    ROW_AXES,
    SHARED,
    UNIT,
    Axis,
    fit_axis,
    format_axis,
    owned_indices,
    replace_roles,
)
from shardkit.authoring.draft.unit_counts import ANY_FIELD, UnitCount, is_kv_count
from shardkit.layout.axis import Unit


@dataclass(frozen=True)
class DraftRule:
    """A rule of a draft: a pattern, its style, and how its axis divides.

    Attributes:
        pattern: The tensors' recipe pattern.
        style: `column`, `row` or `norm`.
        terms: The axis, its units by their names in the recipe.
        fan_in_fan_out: Whether the weight is stored `[in, out]`.
        dim: The divided dimension, if it is not the style's usual one.
        length: The length of the divided dimension.
        owner: The module that holds the tensor.
    """

    pattern: str
    style: str
    terms: Axis
    fan_in_fan_out: bool = False
    dim: int | None = None
    length: int = 0
    owner: str = ""

    @property
    def axis(self) -> str:
        """The axis as a recipe writes it."""
        return format_axis(self.terms)


@dataclass(frozen=True)
class ParallelRegion:
    """A row-parallel layer, and the layers before it that are then column-parallel.

    Attributes:
        row: The rule of the layer that ends the region.
        columns: The rules of the layers before it.
        add_once: Patterns of biases that only one rank may add.
        unit: What the region is divided by.
        shared: What that unit shares, if it shares something.
    """

    row: DraftRule
    columns: tuple[DraftRule, ...]
    add_once: tuple[str, ...]
    unit: UnitCount
    shared: UnitCount | None = None

    @property
    def rules(self) -> tuple[DraftRule, ...]:
        """The rules that divide a tensor."""
        return (*self.columns, self.row)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of all rules."""
        return (self.row.pattern, *(rule.pattern for rule in self.columns), *self.add_once)


@dataclass(frozen=True)
class _Division:
    """One way to divide a layer's input features: by this unit, along this axis."""

    unit: UnitCount
    shared: UnitCount | None
    row_axis: Axis

    @property
    def units(self) -> dict[str, Unit]:
        """The counts of the units, by role."""
        units = {UNIT: Unit(self.unit.value)}
        if self.shared:
            units[SHARED] = Unit(self.shared.value, self.unit.value)
        return units

    @property
    def names(self) -> dict[str, str]:
        """The units' names in the recipe, by role."""
        return {UNIT: self.unit.name, SHARED: self.shared.name if self.shared else ""}


def find_region(layer: LayerDependencies, counts: Sequence[UnitCount]) -> ParallelRegion | None:
    """The finest division under which every tensor the layer depends on is divided or replicated.

    Args:
        layer: A candidate for a row-parallel layer, and what its input features depend on.
        counts: The counts that the model's config has.

    Returns:
        The region, its axes in the units' own names, or None if no division fits.
    """
    for division in _list_divisions(layer.candidate.length, counts):
        columns = _fit_columns(layer, division)
        if _has_matrix(layer, columns):
            return _name_units(layer, division, columns)
    return None


def _list_divisions(length: int, counts: Sequence[UnitCount]) -> Iterator[_Division]:
    """The ways an axis might be divided, the finest first."""
    fitting = (c for c in counts if c.value <= length and length % c.value == 0)
    for unit in (UnitCount("ffn", (ANY_FIELD,), length), *fitting):
        for shared in (None, *_list_shared(unit, counts)):
            for row_axis in ROW_AXES:
                yield _Division(unit, shared, row_axis)


def _list_shared(unit: UnitCount, counts: Sequence[UnitCount]) -> list[UnitCount]:
    """The counts that the unit might share, those named like kv heads first."""
    if unit.is_any:
        return []
    smaller = [c for c in counts if 1 < c.value < unit.value and unit.value % c.value == 0]
    return sorted(smaller, key=lambda count: not is_kv_count(count))


def _has_matrix(layer: LayerDependencies, columns: Sequence[DraftRule]) -> bool:
    """Whether the columns include a matrix, and not the row-parallel layer itself."""
    patterns = {rule.pattern for rule in columns}
    return layer.candidate.pattern not in patterns and any(
        len(dependency.tensor.shape) > 1 and dependency.tensor.pattern in patterns
        for dependency in layer.dependencies
    )


def _fit_columns(layer: LayerDependencies, division: _Division) -> list[DraftRule]:
    """A rule for every tensor that is used in part; none at all if one of them fits no axis."""
    rules: dict[str, DraftRule] = {}
    owned = owned_indices(division.row_axis, layer.candidate.length, division.units)
    if owned is None:
        return []
    norms = layer.candidate.norms
    telling = [d for d in layer.dependencies if _needs_rule(d, norms)]
    for dependency in sorted(telling, key=lambda d: -len(d.tensor.shape)):  # weights before biases
        is_norm = dependency.tensor.owner in norms
        used = _used_in_part(dependency, layer.features, owned, is_norm)
        if not used:
            continue  # every unit uses all of it, or none: it is replicated
        rule = _fit_rule(dependency, used, division.units, is_norm)
        if rule is None or rules.setdefault(rule.pattern, rule).terms != rule.terms:
            return []
    return sorted(rules.values(), key=lambda rule: rule.pattern)


def _needs_rule(dependency: Dependency, norms: Sequence[str]) -> bool:
    """Whether a tensor needs a rule of its own: a bias follows its weight."""
    tensor = dependency.tensor
    if tensor.kind in ("linear", "conv1d", "embedding"):
        return len(tensor.shape) > 1
    return tensor.kind != "norm" or len(tensor.shape) > 1 or tensor.owner in norms


def _used_in_part(
    dependency: Dependency, features: Sequence[int], owned: Any, is_norm: bool
) -> dict[int, tuple[Any, Any]]:
    """The dimensions of which units use some indices only.

    Returns:
        For each such dimension the indices that each unit uses, `[units, length]`, and which of
        the units were tried, `[units]`.
    """
    used = {}
    by_feature = owned[:, list(features)].float()
    tried = by_feature.any(1)
    for dim in (0,) if is_norm else dependency.tensor.output_dims:
        by_unit = (by_feature @ dependency.by_dim[dim].float()) > 0
        if by_unit.any() and not by_unit[tried].all():
            used[dim] = by_unit, tried
    return used


def _fit_rule(
    dependency: Dependency,
    used: Mapping[int, tuple[Any, Any]],
    units: Mapping[str, Unit],
    is_norm: bool,
) -> DraftRule | None:
    """A tensor's rule, along the first dimension that an axis fits; None if none does."""
    tensor = dependency.tensor
    ndim = len(tensor.shape)
    for dim, (by_unit, tried) in used.items():
        terms = fit_axis(by_unit, tried, tensor.shape[dim], units)
        if not terms:
            continue
        is_usual = dim == max(0, ndim - 2)
        is_last = ndim > 1 and dim == ndim - 1
        return DraftRule(
            pattern=tensor.pattern,
            style="norm" if is_norm else "column",
            terms=terms,
            fan_in_fan_out=is_last and not is_usual,
            dim=None if is_usual or is_last else dim,
            length=tensor.shape[dim],
            owner=tensor.owner,
        )
    return None


def _name_units(
    layer: LayerDependencies, division: _Division, columns: Sequence[DraftRule]
) -> ParallelRegion:
    """The region of a division, with the units' own names in its axes."""
    candidate, names = layer.candidate, division.names
    row = DraftRule(
        pattern=candidate.pattern,
        style="row",
        terms=replace_roles(division.row_axis, names),
        fan_in_fan_out=candidate.dim == len(candidate.tensors[0].shape) - 2,
        length=candidate.length,
        owner=candidate.owner,
    )
    shares = any(term.unit == SHARED for rule in columns for term in rule.terms)
    return ParallelRegion(
        row=row,
        columns=tuple(replace(c, terms=replace_roles(c.terms, names)) for c in columns),
        add_once=tuple(dict.fromkeys(tensor.pattern for tensor in layer.added)),
        unit=division.unit,
        shared=division.shared if shares else None,
    )
