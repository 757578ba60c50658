"""Reads recipe files, strictly: an unknown key, a wrong type or an undeclared unit is an error."""

import hashlib
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from shardkit.errors import RecipeError
from shardkit.files import read_small_file
from shardkit.layout.axis import NAME, Term, parse_axis
from shardkit.recipe.recipe import ForwardArgument, ModuleAttribute, Recipe, Rule, Style, UnitRule
from shardkit.strict_json import escape_line

UNDIVIDED: tuple[Style, ...] = ("replicate", "ignore", "once")
DIVIDED: tuple[Style, ...] = ("column", "row", "norm", "gather")
KEYS = {
    "model_types", "when", "notes", "base_model_prefix", "in_out", "units", "counts", "whole",
    "local", "arguments", *get_args(Style),
}  # fmt: skip
PATTERN = re.compile(r"(?:[^{}\s]|\{[^{}*\s]+\})+")
FIELD = r"[A-Za-z_]\w*(?:\.\w+)*"
TENSOR = re.compile(rf"{FIELD}\.(?:weight|bias)", re.ASCII)  # of a module
COUNT = re.compile(rf"{FIELD}(?: / (?:{FIELD}|[1-9][0-9]{{0,3}}))?", re.ASCII)
MAX_BYTES = 1 << 20
MAX_DIM = 8  # of a forward argument


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file.  Raises RecipeError that names the file and the key."""
    try:
        data = read_small_file(Path(os.path.realpath(path)), MAX_BYTES, RecipeError)
    except RecipeError as error:
        raise RecipeError(f"recipe {error}") from None
    try:
        return parse_recipe(path.stem, data)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def parse_recipe(name: str, data: bytes) -> Recipe:
    """A recipe from its file's bytes.  Raises RecipeError that names the key."""
    try:
        return _parse_table(name, hashlib.sha256(data).hexdigest(), tomllib.loads(data.decode()))
    except (RecipeError, ValueError, RecursionError) as error:
        raise RecipeError(escape_line(str(error))) from None


def _parse_table(name: str, sha256: str, table: dict[str, Any]) -> Recipe:
    if unknown := sorted(table.keys() - KEYS):
        raise RecipeError(f"unknown keys: {', '.join(unknown)}")
    units = dict(_parse_units(_read_table(table, "units")))
    counts = dict(_parse_counts(_read_table(table, "counts"), units))
    model_types = _read_strings(table, "model_types")
    if not model_types:
        raise RecipeError("model_types is missing or empty")
    recipe = Recipe(
        name=name,
        sha256=sha256,
        model_types=model_types,
        rules=tuple(_parse_rules(table, units, counts)),
        units=units,
        counts=counts,
        when=_parse_conditions(_read_table(table, "when"), model_types),
        module_attributes=tuple(_parse_attributes(_read_table(table, "local"), units)),
        forward_arguments=tuple(_parse_arguments(_read_table(table, "arguments"), units)),
        base_model_prefix=_read_string(table.get("base_model_prefix", ""), "base_model_prefix"),
        notes=_read_string(table.get("notes", ""), "notes"),
    )
    _check_rules(recipe)
    _check_units(recipe)
    return recipe


def _parse_rules(
    table: dict[str, Any], units: dict[str, UnitRule], counts: dict[str, UnitRule]
) -> Iterator[Rule]:
    for style in UNDIVIDED:
        yield from (Rule(_check_pattern(style, p), style) for p in _read_strings(table, style))
    for pattern, reason in _read_table(table, "whole").items():
        why = _read_string(reason, f"whole.{pattern}")
        yield Rule(_check_pattern("whole", pattern), "replicate", reason=why)
    for pattern in _read_strings(table, "vocab"):
        yield Rule(_check_pattern("vocab", pattern), "vocab", (Term((), "vocab"),))
    in_out, used = set(_read_strings(table, "in_out")), set()
    for style in DIVIDED:
        for pattern, entry in _read_table(table, style).items():
            key = f"{style}.{pattern}"
            text, at = _read_axis_and_dim(key, entry)
            terms = _parse_terms(key, text, units, counts)
            yield Rule(_check_pattern(style, pattern), style, terms, pattern in in_out, at)
            if style in ("column", "row") and at is None:
                used.add(pattern)
    if unused := sorted(in_out - used):
        raise RecipeError(f"in_out names no column or row rule: {', '.join(unused)}")


def _read_axis_and_dim(key: str, entry: Any) -> tuple[Any, int | None]:
    """A rule's axis, and the dimension it states, as `"heads"` or `{ axis = "heads", dim = 0 }`."""
    if not isinstance(entry, dict):
        return entry, None
    if entry.keys() != {"axis", "dim"} or key.startswith(("norm.", "gather.")):
        raise RecipeError(f'{key}: must be "AXIS", or for column or row {{ axis = …, dim = N }}')
    return entry["axis"], _read_dim(key, entry["dim"])


def _read_dim(key: str, dim: Any) -> int:
    if type(dim) is not int or not 0 <= dim < MAX_DIM:
        raise RecipeError(f"{key}: dim is {dim!r}, not 0 to {MAX_DIM - 1}")
    return dim


def _check_rules(recipe: Recipe) -> None:
    patterns = Counter(rule.pattern for rule in recipe.rules)
    if twice := sorted(pattern for pattern, times in patterns.items() if times > 1):
        raise RecipeError(f"more than one rule for {', '.join(twice)}")
    for rule in recipe.rules:
        for term in rule.terms if rule.style == "row" else ():
            if term.unit is None or recipe.units[term.unit].shared_by:
                raise RecipeError(
                    f"row.{rule.pattern}: {term.unit or 'a section without a unit'} may be held by"
                    " several ranks, and a sum over ranks would count it twice"
                )


def _check_units(recipe: Recipe) -> None:
    used = {term.unit for rule in recipe.rules for term in rule.terms}
    used |= {unit.shared_by for unit in recipe.units.values()}
    used |= {name for rule in recipe.module_attributes for name in (rule.unit, rule.per_unit)}
    used |= {rule.unit for rule in recipe.forward_arguments} | {"vocab"}
    factors = {name for rule in recipe.rules for term in rule.terms for name in term.counts}
    if unused := sorted(recipe.counts.keys() - factors):
        raise RecipeError(f"counts.{unused[0]}: no rule uses it")
    if unused := sorted(recipe.units.keys() - used):
        raise RecipeError(f"units.{unused[0]}: no rule uses it")
    for name, unit in recipe.units.items():
        if not unit.shared_by:
            continue
        sharer = recipe.units[unit.shared_by]
        if not unit.fields or not sharer.fields or sharer.shared_by:
            raise RecipeError(
                f"units.{name}: only a unit with a count can be shared, and only by one with a"
                " count that is not shared itself"
            )
    for rule in recipe.rules:
        for term in rule.terms:
            if term.group_tail and recipe.units[term.unit or ""].shared_by != term.shared_by:
                raise RecipeError(
                    f"{rule.style}.{rule.pattern}: {term.unit} is not shared_by {term.shared_by}"
                )


def _parse_units(table: dict[str, Any]) -> Iterator[tuple[str, UnitRule]]:
    yield "vocab", UnitRule(())
    for name, value in table.items():
        _check_name("units", name)
        entry = value if isinstance(value, dict) else {"count": value}
        if unknown := sorted(entry.keys() - {"count", "shared_by"}):
            raise RecipeError(f"units.{name}: unknown keys: {', '.join(unknown)}")
        shared_by = _read_string(entry.get("shared_by", ""), f"units.{name}.shared_by")
        if shared_by and shared_by not in table:
            raise RecipeError(f"units.{name}.shared_by: {shared_by!r} is no unit")
        count = entry.get("count")
        fields = () if count == "*" else _read_count_fields(f"units.{name}", count, " or be '*',")
        yield name, UnitRule(fields, shared_by)


def _parse_counts(
    table: dict[str, Any], units: dict[str, UnitRule]
) -> Iterator[tuple[str, UnitRule]]:
    for name, value in table.items():
        _check_name("counts", name)
        if name in units:
            raise RecipeError(f"counts.{name}: a unit has that name")
        yield name, UnitRule(_read_count_fields(f"counts.{name}", value))


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
        if not COUNT.fullmatch(_read_string(field, key)):
            raise RecipeError(f"{key}: {field!r} is no config field, nor a ratio of two")
    return tuple(fields)


def _parse_conditions(
    table: dict[str, Any], model_types: tuple[str, ...]
) -> dict[str, dict[str, object]]:
    for model_type in table:
        if model_type not in model_types:
            raise RecipeError(f"when.{model_type}: not one of model_types")
        for field, value in _read_table(table, model_type, "when.").items():
            if type(value) not in (bool, int, str):
                raise RecipeError(f"when.{model_type}.{field}: {value!r} is no plain value")
    return table


def _parse_attributes(
    table: dict[str, Any], units: dict[str, UnitRule]
) -> Iterator[ModuleAttribute]:
    for module, entry in table.items():
        for attribute, text in _read_table(table, module, "local.").items():
            key = f"local.{module}.{attribute}"
            names = _read_string(text, key).split("/")
            counted = [name in units and bool(units[name].fields) for name in names]
            tensor = TENSOR.fullmatch(text)
            if not (len(names) < 3 and all(counted)) and text not in units and not tensor:
                raise RecipeError(
                    f"{key}: {text!r} is no unit, nor a ratio of two with counts, nor MODULE.weight"
                )
            yield ModuleAttribute(_check_pattern("local", module), attribute, *names)
        if not entry:
            raise RecipeError(f"local.{module}: is empty")


def _parse_arguments(
    table: dict[str, Any], units: dict[str, UnitRule]
) -> Iterator[ForwardArgument]:
    for module in table:
        for argument, entry in _read_table(table, module, "arguments.").items():
            key = f"arguments.{module}.{argument}"
            if not isinstance(entry, dict) or entry.keys() != {"dim", "axis"}:
                raise RecipeError(f"{key}: must be {{ dim = N, axis = UNIT }}")
            words = _read_string(entry["axis"], key).split()
            outer = words[:1] == ["*"]
            if len(words) != 1 + outer or not units.get(words[-1], UnitRule(())).fields:
                raise RecipeError(f"{key}: {entry['axis']!r} is no unit with a count, nor '* UNIT'")
            dim = _read_dim(key, entry["dim"])
            yield ForwardArgument(
                _check_pattern("arguments", module), argument, dim, words[-1], outer
            )


def _check_pattern(key: str, pattern: str) -> str:
    if not PATTERN.fullmatch(pattern):
        raise RecipeError(f"{key}: {pattern!r} is no name, nor one with * and {{a,b}} in it")
    return pattern


def _parse_terms(
    key: str, text: Any, units: dict[str, UnitRule], counts: dict[str, UnitRule]
) -> tuple[Term, ...]:
    terms = parse_axis(_read_string(text, key), counts)
    if unknown := sorted({t.unit for t in terms if t.unit and t.unit not in units}):
        raise RecipeError(f"{key}: {', '.join(unknown)} is no unit; declare it under [units]")
    return terms


def _read_table(table: dict[str, Any], key: str, inside: str = "") -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise RecipeError(f"{inside}{key} must be a table, not {value!r}")
    return value


def _read_strings(table: dict[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise RecipeError(f"{key} must be a list of names, not {value!r}")
    return tuple(_read_string(item, key) for item in value)


def _read_string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{key} must be a string, not {value!r}")
    return value
