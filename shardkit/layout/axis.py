"""The notation for a (possibly fused) axis, and how it is resolved into sections.

An axis is sections joined by `+`; a section is a product of axes, outermost first, one of which is
the unit that is divided over the ranks.  What is left over is the unit's own size:

    "heads"                          [heads, …]             llama q_proj
    "3 heads"                        [3, heads, …]          gpt2 c_attn: Q, K, V as blocks
    "heads 3"                        [heads, 3, …]          gpt_neox: q, k, v side by side per head
    "heads + kv_heads + kv_heads"    three sections         phi3 qkv_proj
    "heads + 2"                      the 2 on every rank    one k and v for all heads
    "kv_heads (heads + 2)"           [kv_heads, heads/kv_heads + 2, …]   falcon: k and v beside q
    "heads width + groups state"     sizes that differ, by counts        mamba2 conv1d
    "experts ffn"                    [experts, ffn, …]      dbrx: experts stacked in one axis

Unit counts come from the config; sizes from the tensor's own length, so no recipe states a head
dimension unless sections differ in it.  Text is parsed, never evaluated.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

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

    With `group_tail`, each unit follows the `shared_by`s that share it, as that many pieces of its own.
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
    """What must stay whole: how many there are, and by how many others each set is shared.

    `count` None means as many as the axis is long: any even division will do.
    """

    count: int | None
    shared_by: int = 0


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


def parse_axis(text: str, counts: Collection[str] = ()) -> tuple[Term, ...]:
    """The terms of an axis notation; `counts` are the names that are factors, not units.

    Raises RecipeError with the word that is wrong.
    """
    return tuple(_parse_term(section, text, counts) for section in PLUS.split(text))


def resolve_sections(
    terms: tuple[Term, ...],
    axis_length: int,
    units: Mapping[str, Unit],
    counts: Mapping[str, int] | None = None,
) -> tuple[Section, ...]:
    """The sections of an axis of `axis_length` indices.

    Raises RecipeError where the length is no multiple of what the terms count.
    """
    sized = [_size_term(term, terms, axis_length, units, counts or {}) for term in terms]
    written = sum(s.pieces for s in sized)
    if written == 0 or axis_length % written:
        parts = " + ".join(map(_describe, sized))
        raise RecipeError(f"axis of {axis_length} is no multiple of {parts} = {written}")
    size = axis_length // written
    return tuple(_make_section(s, size, units) for s in sized)


def _make_section(sized: _SizedTerm, size: int, units: Mapping[str, Unit]) -> Section:
    term = sized.term
    if term.unit is None:
        return Section(sized.pieces, size, replicated=True)
    sharers = units[term.unit].shared_by
    if term.group_tail:
        return Section(sized.count, size, 1, sharers, group_tail=term.group_tail)
    return Section(sized.count, sized.inner * size, sized.outer, sharers)


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
    count, sharers = units[term.unit].count, units[term.unit].shared_by
    if count is None:
        if any(other.unit != term.unit for other in terms):
            raise RecipeError(f"unit {term.unit!r} has no count, so it cannot stand beside another")
        each = sum(_multiply(t.outer, counts) * _multiply(t.inner, counts) for t in terms)
        count = axis_length // each
    return _SizedTerm(
        term, outer, count, sharers // count + term.group_tail if term.group_tail else inner
    )


def _multiply(factors: Factors, counts: Mapping[str, int]) -> int:
    if absent := [f for f in factors if isinstance(f, str) and f not in counts]:
        raise RecipeError(f"count {absent[0]!r}: config.json does not tell it")
    return math.prod(counts[f] if isinstance(f, str) else f for f in factors)


def _parse_term(section: str, text: str, counts: Collection[str]) -> Term:
    if found := GROUPED.fullmatch(section):
        unit, sharer, beside = found.groups()
        if not 1 <= int(beside) <= MAX_FACTOR or {unit, sharer} & set(counts):
            raise RecipeError(f"axis {text!r}: {section.strip()!r} is not UNIT (SHARER + NUMBER)")
        return Term((), unit, (), sharer, int(beside))
    words = section.split()
    named = [i for i, word in enumerate(words) if NAME.fullmatch(word) and word not in counts]
    wrong = [w for w in words if not NAME.fullmatch(w) and not _is_factor(w)]
    if wrong or not words:
        raise RecipeError(f"axis {text!r}: {' '.join(wrong) or 'empty section'!r} is no unit")
    if len(named) > 1:
        raise RecipeError(f"axis {text!r}: a section divides one unit, not {len(named)}")
    factors = tuple(word if NAME.fullmatch(word) else int(word) for word in words)
    if not named:
        return Term(factors, None)
    at = named[0]
    return Term(factors[:at], words[at], factors[at + 1 :])


def _is_factor(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 8 and 1 <= int(word) <= MAX_FACTOR


def _describe(sized: _SizedTerm) -> str:
    factors = [n for n in (sized.outer, sized.count, sized.inner) if n != 1] or [1]
    return "*".join(map(str, factors))
