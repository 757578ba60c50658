"""Counts from a checkpoint's config.json, without building a model.

A count is a bounded positive integer of the JSON. Where the JSON leaves a field out, the default
is the model family's config class's own (Mistral's 8 kv heads, say), and only then is transformers
imported.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.errors import RecipeError
from shardkit.layout.axis import Unit
from shardkit.recipe.recipe import Recipe, UnitRule

MAX_COUNT = 1 << 32


def matches_config(recipe: Recipe, config: Mapping[str, Any]) -> bool:
    """Whether a recipe is for this config: its `when` conditions hold, defaults included."""
    conditions = recipe.when.get(str(config.get("model_type")), {})
    return all(read_field(config, field) == value for field, value in conditions.items())


def read_part_config(
    config: Mapping[str, Any], field: str, needs_type: bool = True
) -> Mapping[str, Any] | None:
    """The config of a part, its `model_type` the class's own if it states none and needs one.

    None if the config says that there is no such part, or if it leaves the table out and the class
    has no type of its own for it.
    """
    table = _get_field(config, field)
    if isinstance(table, Mapping) and (isinstance(table.get("model_type"), str) or not needs_type):
        return table
    if table is None and _has_field(config, field):
        return None
    model_type = getattr(_find_config_class(config, field.split(".")), "model_type", "")
    if isinstance(table, Mapping):
        return {**table, "model_type": model_type}
    return {"model_type": model_type} if model_type else None


def resolve_units(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Unit]:
    """The recipe's units with the config's counts. Raises RecipeError naming the field."""
    counts = {name: resolve_unit_count(name, recipe, config) for name in recipe.units}
    units = {}
    for name, rule in recipe.units.items():
        count, sharers = counts[name], counts.get(rule.shared_by) or 0
        if sharers and count and sharers % count:
            raise RecipeError(f"{sharers} {rule.shared_by} cannot share {count} {name}")
        block = recipe.units.get(rule.shared_by, rule).block
        units[name] = Unit(count, sharers, {count: block} if count and block > 1 else {})
    return units


def resolve_counts(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, int]:
    """The recipe's counts that are factors of an axis. Raises RecipeError naming the field.

    One that the config lacks is left out: a recipe may serve configs that have no such axis.
    """
    counts = {name: _resolve_count(rule, config) for name, rule in recipe.counts.items()}
    return {name: count for name, count in counts.items() if count is not None}


def resolve_unit_count(name: str, recipe: Recipe, config: Mapping[str, Any]) -> int | None:
    """How many units of a kind there are; None for as many as the axis is long."""
    rule = recipe.units[name]
    if not rule.fields:
        return None
    if (count := _resolve_count(rule, config)) is not None:
        return count
    if rule.shared_by:
        return resolve_unit_count(rule.shared_by, recipe, config)
    raise RecipeError(
        f"config.json: no {' or '.join(rule.fields)}, which recipe {recipe.name!r} needs"
    )


def _resolve_count(rule: UnitRule, config: Mapping[str, Any]) -> int | None:
    """The first field that the config states, or else the first its class has a default for."""
    for field in rule.fields:
        if _get_field(config, split_count(field)[1]) is not None:
            return _read_count(config, field)
    for field in rule.fields:
        _, name, _ = split_count(field)
        if not _has_field(config, name) and type(_class_default(config, name)) is int:
            return _read_count(config, field)
    return None


def split_count(text: str) -> tuple[int, str, str]:
    """A count's factor, its field, and the field or number that it is divided by, if any.

    Example:
        >>> split_count("2 num_heads"), split_count("n_head / 4")
        ((2, 'num_heads', ''), (1, 'n_head', '4'))
    """
    first, _, per = text.partition(" / ")
    factor, _, name = first.rpartition(" ")
    return int(factor or 1), name, per


def _read_count(config: Mapping[str, Any], field: str) -> int:
    factor, name, per = split_count(field)
    value = factor * _check_count(read_field(config, name), name)
    if not per:
        return value
    by = int(per) if per.isdigit() else _check_count(read_field(config, per), per)
    if value % by:
        raise RecipeError(f"config.json: {name} {value} is no multiple of {per} {by}")
    return value // by


def _check_count(value: object, field: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise RecipeError(f"config.json: {field} is {value!r}, not a count of 1 to {MAX_COUNT}")
    return value


def read_field(config: Mapping[str, Any], field: str) -> Any:
    """A field of the config, or if it is left out, its class's default."""
    return _get_field(config, field) if _has_field(config, field) else _class_default(config, field)


def _get_field(config: Mapping[str, Any], field: str) -> Any:
    """A field, `text_config.num_heads` of a nested table, `num_heads.0` of a list."""
    value: Any = config
    for key in field.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _has_field(config: Mapping[str, Any], field: str) -> bool:
    *path, last = field.split(".")
    parent = _get_field(config, ".".join(path)) if path else config
    return last in parent if isinstance(parent, Mapping) else _get_field(config, field) is not None


def _class_default(config: Mapping[str, Any], field: str) -> Any:
    """The default that the family's config class declares; None if it has none, or is unknown.

    The class is read, never built: building one derives some fields from the defaults of others.
    """
    *path, last = field.split(".")
    if (cls := _find_config_class(config, path)) is None:
        return None
    declared = inspect.signature(cls).parameters
    names = [name for name, theirs in cls.attribute_map.items() if theirs == last]
    names.append(cls.attribute_map.get(last, last))
    values = (declared[name].default for name in [last, *names] if name in declared)
    return next((value for value in values if type(value) in (int, bool, str)), None)


def _find_config_class(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The config class of a config, or of a table inside it; None if it is unknown."""
    from transformers import CONFIG_MAPPING  # here, as it costs 2 s and is rarely needed

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    cls: Any = CONFIG_MAPPING[model_type]
    for at, key in enumerate(path):
        stated = _get_field(config, ".".join([*path[: at + 1], "model_type"]))
        known = isinstance(stated, str) and stated in CONFIG_MAPPING
        cls = CONFIG_MAPPING[stated] if known else cls.sub_configs.get(key)
        if not hasattr(cls, "sub_configs"):
            return None
    return cls
