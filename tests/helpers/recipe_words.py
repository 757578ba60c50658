"""Which words of the recipe format a recipe uses, and a few recipes that use them all."""

from collections.abc import Iterator, Mapping

from shardkit.layout import Term
from shardkit.recipe import Recipe


def list_words(recipe: Recipe) -> set[str]:
    """What a recipe says, its names left aside."""
    words = {name for name in ("parts", "prediction_layers", "when") if getattr(recipe, name)}
    for rule in recipe.rules:
        flags = (rule.fan_in_fan_out, rule.stated_dim is not None, bool(rule.whole))
        axis = " + ".join(map(describe_term, rule.terms))
        words.add(f"{rule.style.name} {axis} {flags}")
    words.update(iter_unit_words(recipe))
    for attribute in recipe.module_attributes:
        tensor = "tensor" if attribute.is_counted_by_tensor else "unit"
        words.add(f"attribute {tensor} {bool(attribute.per_unit)}")
    words.update(f"argument {each.outer}" for each in recipe.forward_arguments)
    words.update(f"joint sum {each.at in each.of}" for each in recipe.joint_sums)
    return words


def iter_unit_words(recipe: Recipe) -> Iterator[str]:
    """How a recipe counts its units."""
    for unit in recipe.units.values():
        yield f"unit {len(unit.fields) > 1} {'/' in ''.join(unit.fields)} {bool(unit.shared_by)}"
        yield f"unit {'counted' if unit.fields else '*'}"


def describe_term(term: Term) -> str:
    """A section of an axis, its names left aside."""
    unit = "whole" if term.unit is None else "unit"
    return (
        f"{len(term.outer)} {unit} {len(term.inner)} {bool(term.shared_by)} {term.group_tail > 0}"
    )


def choose_covering(words: Mapping[str, set[str]]) -> list[str]:
    """Few recipes that use every word between them: again and again the one with the most new.

    Args:
        words: Of each recipe, the words that it uses.
    """
    chosen: list[str] = []
    missing = set().union(*words.values())
    while missing:
        best = max(words, key=lambda name: len(words[name] & missing))
        chosen.append(best)
        missing -= words[best]
    return chosen
