"""Reads values of a recipe's table by type; an error names the key."""

import re
from typing import Any

from shardkit.errors import RecipeError

PATTERN = re.compile(r"(?:[^{}\s]|\{[^{}*\s]+\})+")


def expect_table(table: dict[str, Any], key: str, inside: str = "") -> dict[str, Any]:
    """A table; empty if there is none. Raises RecipeError."""
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise RecipeError(f"{inside}{key} must be a table, not {value!r}")
    return value


def expect_strings(table: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings; empty if there is none. Raises RecipeError."""
    value = table.get(key, [])
    if not isinstance(value, list):
        raise RecipeError(f"{key} must be a list of names, not {value!r}")
    return tuple(expect_string(item, key) for item in value)


def expect_string(value: Any, key: str) -> str:
    """A string. Raises RecipeError."""
    if not isinstance(value, str):
        raise RecipeError(f"{key} must be a string, not {value!r}")
    return value


def expect_flag(table: dict[str, Any], key: str) -> bool:
    """A boolean; False if there is none. Raises RecipeError."""
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise RecipeError(f"{key} must be true or false, not {value!r}")
    return value


def check_conditions(table: dict[str, Any], key: str) -> dict[str, object]:
    """The table itself, of fields and values. Raises RecipeError if a value is itself of others."""
    for field, value in table.items():
        if type(value) not in (bool, int, str):
            raise RecipeError(f"{key}.{field}: {value!r} is not a plain value")
    return table


def check_pattern(key: str, pattern: str) -> str:
    """The pattern itself. Raises RecipeError if it is none."""
    if not PATTERN.fullmatch(pattern):
        raise RecipeError(f"{key}: {pattern!r} is not a name, nor one with * and {{a,b}} in it")
    return pattern
