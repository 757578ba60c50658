"""Errors planted in a recipe, to see that the checks catch them.

Each mutant is the recipe with one rule wrong in a way that someone could write it: another layout,
a rule left out, a norm that is not reduced, a bias that every rank adds, an argument not cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardkit.notation import Term
from shardkit.recipe import Recipe, Rule, UnitRule

ANY = "any_even_division"
HALVES = (Term((2,), ANY),)  # each rank takes a part of either half: right for a fused pair alone
PLAIN = (Term((), ANY),)


@dataclass(frozen=True)
class Mutant:
    """A wrong recipe, and the pattern of the rule that is wrong in it."""

    fault: str
    pattern: str
    recipe: Recipe


def mutants(recipe: Recipe, used: frozenset[str]) -> Iterator[Mutant]:
    """Mutants of a recipe, by the rules that a model uses, the most telling kinds first."""
    rules = [rule for rule in recipe.rules if rule.pattern in used]
    for rule in rules:
        if rule.style == "norm":
            yield _with(recipe, rule, "norm not reduced", style="column")
        elif rule.style == "once":
            yield _with(recipe, rule, "bias added by every rank", style="replicate")
        elif rule.style == "gather":
            yield _with(recipe, rule, "input not gathered", style="column")
    for argument in recipe.arguments:
        others = tuple(other for other in recipe.arguments if other != argument)
        fault = f"argument {argument.argument} not cut"
        yield Mutant(fault, argument.module, replace(recipe, arguments=others))
    yield from (_with(recipe, r, "layout swapped", terms=_swapped(r)) for r in rules if _cut(r))
    for rule in rules:
        rest = tuple(other for other in recipe.rules if other != rule)
        yield Mutant("rule left out", rule.pattern, replace(recipe, rules=rest))


def _cut(rule: Rule) -> bool:
    return rule.style in ("column", "row")


def _swapped(rule: Rule) -> tuple[Term, ...]:
    """Another reading of the same axis: of a plain one as halves, of a fused one as plain."""
    fused = len(rule.terms) > 1 or rule.terms[0].outer or rule.terms[0].beside
    return PLAIN if fused else HALVES


def _with(recipe: Recipe, rule: Rule, fault: str, **changes: object) -> Mutant:
    wrong = replace(rule, **changes)  # type: ignore[arg-type]
    rules = tuple(wrong if other == rule else other for other in recipe.rules)
    units = {**recipe.units, ANY: UnitRule(())}
    return Mutant(fault, rule.pattern, replace(recipe, rules=rules, units=units))
