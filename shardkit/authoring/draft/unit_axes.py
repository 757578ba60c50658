"""The axes that are tried for a tensor, and which indices of a tensor each unit owns under them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardkit.errors import LayoutError, RecipeError
from shardkit.layout.axis import Factors, Term, Unit, resolve_sections
from shardkit.layout.spans import rank_spans

Axis = tuple[Term, ...]

# The axes that are tried, in the names of their roles: the unit that is divided, and one that it
# shares, as query heads share kv heads.
UNIT, SHARED = "unit", "shared"
ROW_AXES: tuple[Axis, ...] = ((Term((), UNIT),), (Term((2,), UNIT),))
COLUMN_AXES: tuple[Axis, ...] = (
    (Term((), UNIT),),
    (Term((2,), UNIT),),
    (Term((3,), UNIT),),
    (Term((4,), UNIT),),
    (Term((), SHARED),),
    (Term((2,), SHARED),),
    (Term((), UNIT), Term((), SHARED), Term((), SHARED)),
    (Term((2,), UNIT), Term((), SHARED), Term((), SHARED)),
    (Term((), SHARED, (), UNIT, 2),),
    (Term((), SHARED, (), UNIT, 1),),
    (Term((), UNIT), Term((2,), None)),
    (Term((), UNIT), Term((1,), None)),
)


def fit_axis(by_unit: Any, tried: Any, length: int, units: Mapping[str, Unit]) -> Axis:
    """The tightest axis that gives each unit all that it uses; empty if there is none."""
    best: Axis = ()
    best_size = 0
    if not bool(by_unit[tried].any(1).all()):
        return best
    for terms in COLUMN_AXES:
        owned = owned_indices(terms, length, units)
        if owned is None or bool((by_unit & ~owned).any()):
            continue
        size = int(owned.sum())
        if not best or size < best_size:
            best, best_size = terms, size
    return best


def owned_indices(terms: Axis, length: int, units: Mapping[str, Unit]) -> Any:
    """Which indices of an axis each unit owns: a boolean matrix `[units, length]`.

    Returns None if the axis needs a unit that is not there, or does not divide this length.
    """
    import torch

    if any(term.unit is not None and term.unit not in units for term in terms):
        return None
    count = units[UNIT].count or 0
    try:
        sections = resolve_sections(terms, length, units)
        spans = [rank_spans(sections, rank, count) for rank in range(count)]
    except (RecipeError, LayoutError):
        return None
    owned = torch.zeros((count, length), dtype=torch.bool)
    for row, own_spans in zip(owned, spans, strict=True):
        for start, stop in own_spans:
            row[start:stop] = True
    return owned


def replace_roles(terms: Axis, names: Mapping[str, str]) -> Axis:
    """An axis with the units' own names in place of their roles."""
    return tuple(
        replace(
            term,
            unit=names[term.unit] if term.unit else None,
            shared_by=names[term.shared_by] if term.shared_by else "",
        )
        for term in terms
    )


def format_axis(terms: Axis) -> str:
    """The notation of an axis, as `shardkit.layout.axis.parse_axis` reads it."""
    return " + ".join(_format_term(term) for term in terms)


def _format_term(term: Term) -> str:
    if term.group_tail:
        return f"{term.unit} ({term.shared_by} + {term.group_tail})"
    words: Factors = (*term.outer, *([term.unit] if term.unit else []), *term.inner)
    return " ".join(map(str, words))
