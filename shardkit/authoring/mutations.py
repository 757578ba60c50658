"""Injects faults into a recipe, to see that the checks detect them (mutation testing).

Each mutant is the recipe with one rule wrong in a way that someone could write it: another layout,
a rule left out, a norm that is not reduced, a bias that every rank adds, an argument that is not
cut, an attribute that still counts every rank's heads.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from shardkit.layout import Term
from shardkit.layout.style import (
    ADD_ONCE,
    COLUMN,
    COLUMNS,
    GATHER,
    NORM,
    PADDED,
    RECURRENT,
    REPLICATE,
    ROW,
)
from shardkit.planning import Plan
from shardkit.recipe.catalog import load_heads
from shardkit.recipe.recipe import Recipe, Rule, UnitRule

ANY_UNIT = "any_even_division"
AS_HALVES = (Term((2,), ANY_UNIT),)  # a rank takes a part of either half: right for a fused pair
AS_ONE = (Term((), ANY_UNIT),)
SWAPPED = (*COLUMNS, ROW, RECURRENT)  # styles whose axis may be read in another way
STYLE_FAULTS = {  # a style that should reduce, gather or add once: what is forgotten, what is left
    NORM: ("norm not reduced", COLUMN),
    ADD_ONCE: ("bias added by every rank", REPLICATE),
    GATHER: ("input not gathered", COLUMN),
    PADDED: ("output not padded", COLUMN),
}


@dataclass(frozen=True)
class Mutant:
    """A recipe with an injected fault.

    Attributes:
        fault: What is wrong.
        pattern: The pattern of the rule that is wrong.
        recipe: The wrong recipe.
        must_be_detected: Whether the checks must fail. Some attention functions never read the
            attribute or argument that a mutant leaves whole; the model then computes the same. Nor
            need one be if every tensor is placed as by the right recipe.
    """

    fault: str
    pattern: str
    recipe: Recipe
    must_be_detected: bool = True


def list_rules(recipe: Recipe, plan: Plan) -> dict[str, frozenset[str]]:
    """The patterns of the rules that a plan has used, each with the tensors that it names."""
    by_pattern = defaultdict(set)
    for placement in plan.placements:
        name = placement.spec.name
        by_pattern[recipe.rule_for(name).stated_pattern].add(name)
    return {pattern: frozenset(names) for pattern, names in by_pattern.items()}


def list_mutants(recipe: Recipe, rules: Mapping[str, Collection[str]]) -> Iterator[Mutant]:
    """The mutants of a recipe, one of each kind in turn.

    Args:
        recipe: The right recipe.
        rules: The patterns of the rules that a model uses, each with the tensors that it names.
    """
    used = [rule for rule in recipe.rules if rule.pattern in rules]
    with_bias = [
        rule
        for rule in used
        if rule.style is ROW and any(name.endswith("bias") for name in rules[rule.pattern])
    ]
    kinds = [
        (_mutate_style(recipe, rule) for rule in used if rule.style in STYLE_FAULTS),
        _omit_arguments(recipe),
        (_swap_layout(recipe, rule) for rule in used if rule.style in SWAPPED),
        (_replicate_bias(recipe, rule) for rule in with_bias),
        _omit_attributes(recipe),
        (_omit_rule(recipe, rule) for rule in used if rule.pattern not in load_heads()),
    ]
    yield from (mutant for mutant in chain(*zip_longest(*kinds)) if mutant)


def _mutate_style(recipe: Recipe, rule: Rule) -> Mutant:
    fault, style = STYLE_FAULTS[rule.style]
    return _replace_rule(recipe, rule, fault, style=style)


def _omit_arguments(recipe: Recipe) -> Iterator[Mutant]:
    for argument in recipe.forward_arguments:
        others = tuple(other for other in recipe.forward_arguments if other != argument)
        fault = f"argument {argument.argument} not cut"
        yield Mutant(fault, argument.module, replace(recipe, forward_arguments=others), False)


def _omit_attributes(recipe: Recipe) -> Iterator[Mutant]:
    """Attributes left out; most attention functions take the head count from the tensors."""
    for attribute in recipe.module_attributes:
        others = tuple(other for other in recipe.module_attributes if other != attribute)
        fault = f"attribute {attribute.attribute} left whole"
        yield Mutant(fault, attribute.module, replace(recipe, module_attributes=others), False)


def _replicate_bias(recipe: Recipe, rule: Rule) -> Mutant:
    """The rule for the weight alone, and the bias replicated like any small tensor."""
    weight = replace(rule, pattern=f"{rule.pattern}.weight")
    bias = Rule(f"{rule.pattern}.bias", REPLICATE)
    others = (other for other in recipe.rules if other != rule)
    wrong = replace(recipe, rules=(*others, weight, bias))
    return Mutant("bias added by every rank", rule.pattern, wrong)


def _omit_rule(recipe: Recipe, rule: Rule) -> Mutant:
    others = tuple(other for other in recipe.rules if other != rule)
    return Mutant("rule left out", rule.pattern, replace(recipe, rules=others))


def _swap_layout(recipe: Recipe, rule: Rule) -> Mutant:
    """Another reading of the same axis: a plain one as two halves, a fused one as plain."""
    is_fused = len(rule.terms) > 1 or rule.terms[0].outer or rule.terms[0].group_tail
    return _replace_rule(recipe, rule, "layout swapped", terms=AS_ONE if is_fused else AS_HALVES)


def _replace_rule(recipe: Recipe, rule: Rule, fault: str, **changes: object) -> Mutant:
    wrong = replace(rule, **changes)  # type: ignore[arg-type]
    rules = tuple(wrong if other == rule else other for other in recipe.rules)
    units = {**recipe.units, ANY_UNIT: UnitRule(())}
    return Mutant(fault, rule.pattern, replace(recipe, rules=rules, units=units))
