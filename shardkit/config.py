"""Unit counts from a checkpoint's config.json, without building a model.

A count is a bounded positive integer of the JSON.  Where the JSON leaves a field out, the default
is the model family's config class's own (Mistral's 8 kv heads, say), and only then is transformers
imported.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from shardkit.errors import RecipeError
from shardkit.notation import Unit
from shardkit.recipe import Recipe, UnitRule

MAX_COUNT = 1 << 32


def resolve_units(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Unit]:
    """The recipe's units with the config's counts.  Raises RecipeError naming the field."""
    counts = {name: unit_count(name, recipe, config) for name in recipe.units}
    units = {}
    for name, rule in recipe.units.items():
        count, sharers = counts[name], counts.get(rule.shared_by) or 0
        if sharers and count and sharers % count:
            raise RecipeError(f"{sharers} {rule.shared_by} cannot share {count} {name}")
        units[name] = Unit(count, sharers)
    return units


def unit_count(name: str, recipe: Recipe, config: Mapping[str, Any]) -> int | None:
    """How many units of a kind there are; None for as many as the axis is long."""
    rule = recipe.units[name]
    if not rule.fields:
        return None
    for field in rule.fields:
        if (value := _get(config, field)) is not None:
            return _checked(value, field)
    absent = [field for field in rule.fields if not _has(config, field)]
    if absent and (value := _class_default(config, rule)) is not None:
        return _checked(value, rule.fields[0])
    if rule.shared_by:
        return unit_count(rule.shared_by, recipe, config)
    raise RecipeError(
        f"config.json: no {' or '.join(rule.fields)}, which recipe {recipe.name!r} needs"
    )


def _checked(value: object, field: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise RecipeError(f"config.json: {field} is {value!r}, not a count of 1 to {MAX_COUNT}")
    return value


def _get(config: Mapping[str, Any], field: str) -> Any:
    value: Any = config
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _has(config: Mapping[str, Any], field: str) -> bool:
    *path, last = field.split(".")
    parent = _get(config, ".".join(path)) if path else config
    return isinstance(parent, Mapping) and last in parent


def _class_default(config: Mapping[str, Any], rule: UnitRule) -> Any:
    """The default that the family's config class declares; None where it has none, or is unknown.

    The class is read, never built: building one derives some fields from the defaults of others.
    """
    from transformers import CONFIG_MAPPING  # here, as it costs 2 s and is rarely needed

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    declared = inspect.signature(CONFIG_MAPPING[model_type]).parameters
    values = (declared[field].default for field in rule.fields if field in declared)
    return next((value for value in values if type(value) is int), None)
