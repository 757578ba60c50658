"""The notation for a (possibly fused) axis, and how it is resolved into sections.

An axis is sections joined by `+`; a section is a product of axes, outermost first, one of which is
the unit that is divided over the ranks.  What is left over is the unit's own size:

    "heads"                          [heads, …]             llama q_proj
    "3 heads"                        [3, heads, …]          gpt2 c_attn: Q, K, V as blocks
    "heads 3"                        [heads, 3, …]          gpt_neox: q, k, v side by side per head
    "heads + kv_heads + kv_heads"    three sections         phi3 qkv_proj
    "heads + 2"                      the 2 on every rank    one k and v for all heads

Unit counts come from the config; sizes from the tensor's own length, so no recipe states a head
dimension.  Text is parsed, never evaluated.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardkit.errors import RecipeError
from shardkit.layout import Section

NAME = re.compile(r"[a-z][a-z0-9_]*")
MAX_FACTOR = 1 << 20


@dataclass(frozen=True, slots=True)
class Term:
    """One section of an axis as written: `outer` blocks of `unit`s, each of `inner` pieces."""

    outer: int
    unit: str | None
    inner: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """What must stay whole: how many there are, and by how many others each set is shared.

    `count` None means as many as the axis is long: any even division will do.
    """

    count: int | None
    sharers: int = 0


def parse_axis(text: str) -> tuple[Term, ...]:
    """The terms of an axis notation.  Raises RecipeError with the word that is wrong."""
    return tuple(_parse_term(section, text) for section in text.split("+"))


def sections(
    terms: tuple[Term, ...], axis_length: int, units: Mapping[str, Unit]
) -> tuple[Section, ...]:
    """The sections of an axis of `axis_length` indices.

    Raises RecipeError where the length is no multiple of what the terms count.
    """
    counts = [_count(term, terms, axis_length, units) for term in terms]
    # A section without a unit is all count: its factors are not blocks of anything.
    written = sum(
        (t.outer if t.unit else 1) * n * t.inner for t, n in zip(terms, counts, strict=True)
    )
    if written == 0 or axis_length % written:
        parts = " + ".join(_shown(t, n) for t, n in zip(terms, counts, strict=True))
        raise RecipeError(f"axis of {axis_length} is no multiple of {parts} = {written}")
    size = axis_length // written
    return tuple(
        Section(n, t.inner * size, t.outer, units[t.unit].sharers)
        if t.unit
        else Section(n, size, whole=True)
        for t, n in zip(terms, counts, strict=True)
    )


def _count(term: Term, terms: tuple[Term, ...], axis_length: int, units: Mapping[str, Unit]) -> int:
    if term.unit is None:
        return term.outer
    count = units[term.unit].count
    if count is not None:
        return count
    if any(other.unit != term.unit for other in terms):
        raise RecipeError(f"unit {term.unit!r} has no count, so it cannot stand beside another")
    return axis_length // sum(t.outer * t.inner for t in terms)


def _parse_term(section: str, text: str) -> Term:
    words = section.split()
    names = [i for i, word in enumerate(words) if NAME.fullmatch(word)]
    wrong = [w for i, w in enumerate(words) if i not in names and not _is_factor(w)]
    if wrong or not words:
        raise RecipeError(f"axis {text!r}: {' '.join(wrong) or 'empty section'!r} is no unit")
    if len(names) > 1:
        raise RecipeError(f"axis {text!r}: a section divides one unit, not {len(names)}")
    if not names:
        return Term(math.prod(map(int, words)), None)
    at = names[0]
    outer, inner = (math.prod(map(int, part)) for part in (words[:at], words[at + 1 :]))
    return Term(outer, words[at], inner)


def _is_factor(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 8 and 1 <= int(word) <= MAX_FACTOR


def _shown(term: Term, count: int) -> str:
    if term.unit is None:
        return str(count)
    factors = [n for n in (term.outer, count, term.inner) if n != 1] or [1]
    return "*".join(map(str, factors))
