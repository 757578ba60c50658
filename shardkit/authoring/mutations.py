"""Errors planted in a recipe, to see that the checks catch them.

Each mutant is the recipe with one rule wrong in a way that someone could write it: another layout,
a rule left out, a norm that is not reduced, a bias that every rank adds, an argument not cut, an
attribute that still counts every rank's heads.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from shardkit.layout.axis import Term
from shardkit.layout.style import (
    ADD_ONCE,
    COLUMN,
    GATHER,
    NORM,
    RECURRENT,
    REPLICATE,
    ROW,
)
from shardkit.recipe.recipe import Recipe, Rule, UnitRule

ANY = "any_even_division"
HALVES = (Term((2,), ANY),)  # each rank takes a part of either half: right for a fused pair alone
PLAIN = (Term((), ANY),)
STYLES = {  # of a rule that should reduce, gather or add once: what is forgotten, and what is left
    NORM: ("norm not reduced", COLUMN),
    ADD_ONCE: ("bias added by every rank", REPLICATE),
    GATHER: ("input not gathered", COLUMN),
}


@dataclass(frozen=True)
class Mutant:
    """A wrong recipe, and the pattern of the rule that is wrong in it.

    `telling` False: some attention functions never read what it leaves whole; then the model
    computes the same, and nothing is to be caught.
    """

    fault: str
    pattern: str
    recipe: Recipe
    telling: bool = True


def mutants(recipe: Recipe, rules: Mapping[str, Collection[str]]) -> Iterator[Mutant]:
    """Mutants of a recipe, one of each kind in turn.

    `rules` are the patterns of those that a model uses, each with the tensors that it names.
    """
    used = [rule for rule in recipe.rules if rule.pattern in rules]
    biased = [
        r for r in used if r.style is ROW and any(t.endswith("bias") for t in rules[r.pattern])
    ]
    kinds = [
        (_with(recipe, r, STYLES[r.style][0], style=STYLES[r.style][1])
         for r in used if r.style in STYLES),
        _arguments(recipe),
        (_with(recipe, r, "layout swapped", terms=_swapped(r)) for r in used if _cut(r)),
        (_doubled(recipe, rule) for rule in biased),
        _attributes(recipe),
        (_without(recipe, rule) for rule in used),
    ]  # fmt: skip
    yield from (mutant for mutant in chain(*zip_longest(*kinds)) if mutant)


def _arguments(recipe: Recipe) -> Iterator[Mutant]:
    for argument in recipe.forward_arguments:
        others = tuple(other for other in recipe.forward_arguments if other != argument)
        fault = f"argument {argument.argument} not cut"
        yield Mutant(fault, argument.module, replace(recipe, forward_arguments=others), False)


def _attributes(recipe: Recipe) -> Iterator[Mutant]:
    """Attributes left out: most attention functions take the head count from the tensors."""
    for attribute in recipe.module_attributes:
        others = tuple(other for other in recipe.module_attributes if other != attribute)
        fault = f"attribute {attribute.attribute} left whole"
        yield Mutant(fault, attribute.module, replace(recipe, module_attributes=others), False)


def _doubled(recipe: Recipe, rule: Rule) -> Mutant:
    """The rule for the weight alone, and the bias replicated like any small tensor."""
    weight = replace(rule, pattern=f"{rule.pattern}.weight")
    bias = Rule(f"{rule.pattern}.bias", REPLICATE)
    others = (other for other in recipe.rules if other != rule)
    wrong = replace(recipe, rules=(*others, weight, bias))
    return Mutant("bias added by every rank", rule.pattern, wrong)


def _without(recipe: Recipe, rule: Rule) -> Mutant:
    rest = tuple(other for other in recipe.rules if other != rule)
    return Mutant("rule left out", rule.pattern, replace(recipe, rules=rest))


def _cut(rule: Rule) -> bool:
    return rule.style in (COLUMN, ROW, RECURRENT)


def _swapped(rule: Rule) -> tuple[Term, ...]:
    """Another reading of the same axis: of a plain one as halves, of a fused one as plain."""
    fused = len(rule.terms) > 1 or rule.terms[0].outer or rule.terms[0].group_tail
    return PLAIN if fused else HALVES


def _with(recipe: Recipe, rule: Rule, fault: str, **changes: object) -> Mutant:
    wrong = replace(rule, **changes)  # type: ignore[arg-type]
    rules = tuple(wrong if other == rule else other for other in recipe.rules)
    units = {**recipe.units, ANY: UnitRule(())}
    return Mutant(fault, rule.pattern, replace(recipe, rules=rules, units=units))
