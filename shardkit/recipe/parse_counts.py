"""Reads a recipe's units, counts and parts: what it takes from the config."""

import re
from collections.abc import Iterator
from typing import Any

from shardkit.errors import RecipeError
from shardkit.layout import STYLES
from shardkit.layout.axis import NAME
from shardkit.recipe.recipe import Part, UnitRule
from shardkit.recipe.toml_values import check_pattern, expect_string

KEYS = {
    "model_types", "when", "notes", "base_model_prefix", "fan_in_fan_out", "units", "counts",
    "replicated", "module_attributes", "forward_arguments", "joint_sums", "parts", "part_only",
    "prediction_layers", "layer_kinds", "expert_modules",
    *(style.name for style in STYLES.values() if style.axis != "experts"),
}  # fmt: skip
FIELD = r"[A-Za-z_]\w*(?:\.(?:\w+|\*\[\w+\]))*"  # a list's entry may be that of a kind of layers
FIELD_NAME = re.compile(FIELD, re.ASCII)
MAX_BLOCK = 9999
NUMBER = "[1-9][0-9]{0,3}"
COUNT = re.compile(rf"(?:{NUMBER} )?{FIELD}(?: / (?:{FIELD}|{NUMBER}))?", re.ASCII)


def parse_units(table: dict[str, Any]) -> Iterator[tuple[str, UnitRule]]:
    """The units by name, the vocabulary first. Raises RecipeError."""
    yield "vocab", UnitRule(())
    for name, value in table.items():
        _check_name("units", name)
        entry = value if isinstance(value, dict) else {"count": value}
        if unknown := sorted(entry.keys() - {"count", "shared_by", "block"}):
            raise RecipeError(f"units.{name}: unknown keys: {', '.join(unknown)}")
        shared_by = expect_string(entry.get("shared_by", ""), f"units.{name}.shared_by")
        if shared_by and shared_by not in table:
            raise RecipeError(f"units.{name}.shared_by: {shared_by!r} is not a unit")
        count = entry.get("count")
        fields = () if count == "*" else _read_count_fields(f"units.{name}", count, " or be '*',")
        block = _read_block(entry, name)
        if block > 1 and (shared_by or not fields):
            raise RecipeError(f"units.{name}.block: only of a unit with a count that is not shared")
        yield name, UnitRule(fields, shared_by, block)


def parse_counts(
    table: dict[str, Any], units: dict[str, UnitRule]
) -> Iterator[tuple[str, UnitRule]]:
    """The counts by name. Raises RecipeError."""
    for name, value in table.items():
        _check_name("counts", name)
        if name in units:
            raise RecipeError(f"counts.{name}: a unit has that name")
        yield name, UnitRule(_read_count_fields(f"counts.{name}", value))


def _read_block(entry: dict[str, Any], name: str) -> int:
    block = entry.get("block", 1)
    if type(block) is not int or not 1 <= block <= MAX_BLOCK:
        raise RecipeError(f"units.{name}.block: {block!r} is not a number of 1 to {MAX_BLOCK}")
    return block


def _check_name(key: str, name: str) -> None:
    if name in KEYS:
        raise RecipeError(f"{key}.{name}: a key of the recipe; put it above the first table")
    if not NAME.fullmatch(name):
        raise RecipeError(f"{key}.{name}: not a name a unit can have")


def _read_count_fields(key: str, value: Any, otherwise: str = "") -> tuple[str, ...]:
    fields = [value] if isinstance(value, str) else value
    if not isinstance(fields, list) or not fields:
        raise RecipeError(f"{key}: must name a config field,{otherwise} not {value!r}")
    for field in fields:
        if not COUNT.fullmatch(expect_string(field, key)):
            raise RecipeError(f"{key}: {field!r} is not a config field, nor a ratio of two")
    return tuple(fields)


def parse_parts(table: dict[str, Any]) -> Iterator[Part]:
    """The parts, in the order of the table. Raises RecipeError."""
    for config_field, value in table.items():
        key = f"parts.{config_field}"
        if not FIELD_NAME.fullmatch(config_field):
            raise RecipeError(f"{key}: not the name of a config field")
        if isinstance(value, list) and len(value) < 2:
            raise RecipeError(f"{key}: a list must have two parts or more")
        for entry in value if isinstance(value, list) else [value]:
            yield _parse_part(key, config_field, entry)


def _parse_part(key: str, config_field: str, value: Any) -> Part:
    entry = value if isinstance(value, dict) else {"module": expect_string(value, key)}
    if not {"module"} <= entry.keys() <= {"module", "recipe"}:
        raise RecipeError(f'{key}: must be "MODULE", or {{ module = "…", recipe = "NAME" }}')
    module = check_pattern(key, expect_string(entry["module"], key))
    if module.count("{") > 1:
        raise RecipeError(f"{key}: {module!r} has more than one {{a,b}}; list whole names in one")
    return Part(config_field, module, expect_string(entry.get("recipe", ""), key))


def parse_layer_kinds(table: dict[str, Any]) -> dict[str, dict[str, object]]:
    """The kinds of layers, and for each the config's lists that tell it. Raises RecipeError."""
    for kind, lists in table.items():
        key = f"layer_kinds.{kind}"
        if not NAME.fullmatch(kind) or not isinstance(lists, dict) or not lists:
            raise RecipeError(f"{key}: must be {{ FIELD = VALUE }}, a list of config.json for each")
        for field, value in lists.items():
            if type(value) not in (bool, int, str):
                raise RecipeError(f"{key}.{field}: {value!r} is not a plain value")
    return table


def parse_prediction_layers(table: dict[str, Any]) -> dict[str, str]:
    """The modules that predict further tokens, and those whose rules count. Raises RecipeError."""
    for module, like in table.items():
        key = f"prediction_layers.{module}"
        if not FIELD_NAME.fullmatch(module) or not FIELD_NAME.fullmatch(expect_string(like, key)):
            raise RecipeError(f"{key}: {like!r} must be the name of a module, for another one")
        if f"{like}.".startswith(f"{module}."):
            raise RecipeError(f"{key}: {like!r} is inside of it")
    return table
