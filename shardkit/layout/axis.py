"""The notation for a (possibly fused) axis, and how it is resolved into sections.

An axis is sections joined by `+`; a section is a product of axes, outermost first, one of which is
the unit that is divided over the ranks. What is left over is the unit's own size:

    "heads"                          [heads, …]             llama q_proj
    "3 heads"                        [3, heads, …]          gpt2 c_attn: Q, K, V as blocks
    "heads 3"                        [heads, 3, …]          gpt_neox: q, k, v side by side per head
    "heads + kv_heads + kv_heads"    three sections         phi3 qkv_proj
    "heads + 2"                      the 2 on every rank    one k and v for all heads
    "kv_heads (heads + 2)"           [kv_heads, heads/kv_heads + 2, …]   falcon: k and v beside q
    "heads width + groups state"     sizes that differ, by counts        mamba2 conv1d
    "experts ffn"                    [experts, ffn, …]      dbrx: experts stacked in one axis

Unit counts come from the config; sizes from the tensor's own length, so no recipe states a head
dimension unless sections differ in it. Text is parsed, never evaluated.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shardkit.errors import RecipeError
from shardkit.layout.spans import Section

NAME = re.compile(r"[a-z][a-z0-9_]*")
PLUS = re.compile(r"\+(?![^()]*\))")  # outside brackets
GROUPED = re.compile(rf"\s*({NAME.pattern})\s*\(\s*({NAME.pattern})\s*\+\s*([0-9]{{1,7}})\s*\)\s*")
MAX_FACTOR = 1 << 20

Factors = tuple[int | str, ...]  # numbers, and the names of counts


@dataclass(frozen=True, slots=True)
class Term:
    """One section of an axis as written: blocks (`outer`) of `unit`s, each of `inner` pieces.

    Attributes:
        outer: The factors before the unit.
        unit: The unit that is divided; None if every rank holds the whole section.
        inner: The factors after the unit.
        shared_by: The unit whose members lie in groups before each of this unit's.
        group_tail: How many pieces of its own follow each group; 0 if there are no groups.
    """

    outer: Factors
    unit: str | None
    inner: Factors = ()
    shared_by: str = ""
    group_tail: int = 0

    @property
    def counts(self) -> set[str]:
        """The names of the counts it has as factors."""
        return {factor for factor in self.outer + self.inner if isinstance(factor, str)}


@dataclass(frozen=True, slots=True)
class Unit:
    """What must stay whole, counted.

    Attributes:
        count: How many there are; None for as many as the axis is long: any partition will do.
        shared_by: How many units of another kind share them; 0 if none do.
        blocks: For counts of them, how many stay together if not each alone; of shared ones, how
            many of those that share them.
    """

    count: int | None
    shared_by: int = 0
    blocks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _SizedTerm:
    """A term with its numbers: `outer` blocks of `count` units of `inner` pieces."""

    term: Term
    outer: int
    count: int
    inner: int

    @property
    def pieces(self) -> int:
        return self.outer * self.count * self.inner

    def __str__(self) -> str:
        factors = [n for n in (self.outer, self.count, self.inner) if n != 1] or [1]
        return "*".join(map(str, factors))


def parse_axis(text: str, counts: Collection[str] = ()) -> tuple[Term, ...]:
    """The terms of an axis notation.

    Args:
        text: The notation, `"heads + kv_heads + kv_heads"`.
        counts: The names that are factors and not units.

    Raises:
        RecipeError: With the word that is wrong.

    Example:
        >>> parse_axis("3 heads")
        (Term(outer=(3,), unit='heads', inner=(), shared_by='', group_tail=0),)
    """
    return tuple(_parse_term(section, text, counts) for section in PLUS.split(text))


def resolve_sections(
    terms: tuple[Term, ...],
    axis_length: int,
    units: Mapping[str, Unit],
    counts: Mapping[str, int] | None = None,
) -> tuple[Section, ...]:
    """The sections of an axis of `axis_length` indices.

    Raises RecipeError if the length is not a multiple of what the terms count.
    """
    sized = [_size_term(term, terms, axis_length, units, counts or {}) for term in terms]
    pieces = sum(s.pieces for s in sized)
    if pieces == 0 or axis_length % pieces:
        parts = " + ".join(map(str, sized))
        raise RecipeError(f"axis of {axis_length} is not a multiple of {parts} = {pieces}")
    return tuple(_make_section(s, axis_length // pieces, units) for s in sized)


def _make_section(sized: _SizedTerm, size: int, units: Mapping[str, Unit]) -> Section:
    term = sized.term
    if term.unit is None:
        return Section(sized.pieces, size, replicated=True)
    shared_by = units[term.unit].shared_by
    block = units[term.unit].blocks.get(sized.count, 1)
    if term.group_tail:
        return Section(sized.count, size, 1, shared_by, group_tail=term.group_tail, block=block)
    return Section(sized.count, sized.inner * size, sized.outer, shared_by, block=block)


def _size_term(
    term: Term,
    terms: tuple[Term, ...],
    axis_length: int,
    units: Mapping[str, Unit],
    counts: Mapping[str, int],
) -> _SizedTerm:
    outer, inner = _multiply(term.outer, counts), _multiply(term.inner, counts)
    if term.unit is None:
        return _SizedTerm(term, outer, 1, 1)
    count, shared_by = units[term.unit].count, units[term.unit].shared_by
    if count is None:
        if any(other.unit != term.unit for other in terms):
            raise RecipeError(f"unit {term.unit!r} has no count, so it cannot stand beside another")
        each = sum(_multiply(t.outer, counts) * _multiply(t.inner, counts) for t in terms)
        count = axis_length // each
    if term.group_tail:
        inner = shared_by // count + term.group_tail
    return _SizedTerm(term, outer, count, inner)


def _multiply(factors: Factors, counts: Mapping[str, int]) -> int:
    if absent := [f for f in factors if isinstance(f, str) and f not in counts]:
        raise RecipeError(f"count {absent[0]!r}: config.json does not have it")
    return math.prod(counts[f] if isinstance(f, str) else f for f in factors)


def _parse_term(section: str, text: str, counts: Collection[str]) -> Term:
    if match := GROUPED.fullmatch(section):
        return _parse_grouped_term(match, text, counts)
    words = section.split()
    names = [i for i, word in enumerate(words) if NAME.fullmatch(word) and word not in counts]
    wrong = [w for w in words if not NAME.fullmatch(w) and not _is_factor(w)]
    if wrong or not words:
        raise RecipeError(f"axis {text!r}: {' '.join(wrong) or 'empty section'!r} is not a unit")
    if len(names) > 1:
        raise RecipeError(f"axis {text!r}: a section divides one unit, not {len(names)}")
    factors = tuple(word if NAME.fullmatch(word) else int(word) for word in words)
    if not names:
        return Term(factors, None)
    at = names[0]
    return Term(factors[:at], words[at], factors[at + 1 :])


def _parse_grouped_term(match: re.Match[str], text: str, counts: Collection[str]) -> Term:
    unit, shared_by, tail = match.groups()
    if not 1 <= int(tail) <= MAX_FACTOR or {unit, shared_by} & set(counts):
        raise RecipeError(f"axis {text!r}: {match[0].strip()!r} is not UNIT (OTHER + NUMBER)")
    return Term((), unit, (), shared_by, int(tail))


def _is_factor(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 8 and 1 <= int(word) <= MAX_FACTOR
