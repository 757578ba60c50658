"""Layers of kinds: which of a config's layers a rule is for, if a pattern says `*[full]`.

A config's list says of each layer what it is. Once a config is known, a pattern with a kind is one
with the numbers of its layers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from shardkit.config_fields import PREDICTION_LAYERS
from shardkit.errors import RecipeError
from shardkit.recipe.counts import read_field
from shardkit.recipe.joint_sums import JointSum
from shardkit.recipe.recipe import ForwardArgument, ModuleAttribute, Recipe, Rule

KIND = re.compile(r"\*\[(\w+)\]")
MAX_FURTHER = 64  # layers: a config is not to be trusted
T = TypeVar("T", Rule, ModuleAttribute, ForwardArgument, JointSum)


def number_layers(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """The recipe with the numbers of layers in place of their kinds.

    Args:
        recipe: The recipe.
        config: The config that has its fields.

    Raises:
        RecipeError: If the config has none of the lists that tell a kind.
    """
    if not recipe.layer_kinds:
        return recipe
    layers = {kind: _find_layers(recipe, kind, config) for kind in recipe.layer_kinds}
    return replace(
        recipe,
        units={
            name: replace(unit, fields=tuple(_number_fields(unit.fields, layers)))
            for name, unit in recipe.units.items()
        },
        rules=tuple(
            replace(rule, template=old.pattern) if rule.pattern != old.pattern else rule
            for old in recipe.rules
            for rule in _number([old], "pattern", layers)
        ),
        module_attributes=tuple(_number(recipe.module_attributes, "module", layers)),
        forward_arguments=tuple(_number(recipe.forward_arguments, "module", layers)),
        joint_sums=tuple(_number(recipe.joint_sums, "module", layers)),
        layer_kinds={},
    )


def list_kinds(pattern: str) -> list[str]:
    """The kinds of layers that a pattern names.

    Example:
        >>> list_kinds("model.layers.*[full].self_attn.k_proj")
        ['full']
    """
    return KIND.findall(pattern)


def _find_layers(recipe: Recipe, kind: str, config: Mapping[str, Any]) -> list[int]:
    """The layers of a kind, by the first of its lists that the config has.

    Layers that predict further tokens come after those of the list, and are as the last of these.
    """
    further = sum(config[key] for key in PREDICTION_LAYERS if type(config.get(key)) is int)
    for field, value in recipe.layer_kinds[kind].items():
        if isinstance(kinds := read_field(config, field), list):
            every = kinds + kinds[-1:] * min(further, MAX_FURTHER)
            return [at for at, stated in enumerate(every) if stated == value]
    fields = " or ".join(recipe.layer_kinds[kind])
    raise RecipeError(f"config.json: no list {fields}, which recipe {recipe.name!r} needs")


def _number_fields(fields: Sequence[str], layers: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """The fields of a count with the first layer's number for its kind."""
    for field in fields:
        if all(layers[kind] for kind in list_kinds(field)):
            yield KIND.sub(lambda match: str(layers[match[1]][0]), field)


def _number(rules: Sequence[T], field: str, layers: Mapping[str, Sequence[int]]) -> Iterator[T]:
    """The rules with numbers; without those of kinds that no layer is of."""
    for rule in rules:
        pattern = getattr(rule, field)
        if all(layers[kind] for kind in list_kinds(pattern)):
            changes: dict[str, Any] = {field: KIND.sub(lambda m: _join(layers[m[1]]), pattern)}
            yield replace(rule, **changes)


def _join(numbers: Sequence[int]) -> str:
    return f"{{{','.join(map(str, numbers))}}}"
