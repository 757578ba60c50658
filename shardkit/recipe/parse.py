"""Reads recipe files, strictly: an unknown key, a wrong type or an undeclared unit is an error."""

import hashlib
import os
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from shardkit.errors import RecipeError
from shardkit.files import read_small_file
from shardkit.layout import STYLES, Style, Term, parse_axis
from shardkit.layout.style import REPLICATE
from shardkit.recipe.joint_sums import parse_joint_sums
from shardkit.recipe.layer_kinds import list_kinds
from shardkit.recipe.parse_counts import (
    FIELD,
    KEYS,
    parse_counts,
    parse_layer_kinds,
    parse_parts,
    parse_prediction_layers,
    parse_units,
)
from shardkit.recipe.recipe import (
    EXPERTS,
    ForwardArgument,
    ModuleAttribute,
    Recipe,
    Rule,
    UnitRule,
)
from shardkit.recipe.toml_values import (
    check_conditions,
    check_pattern,
    expect_flag,
    expect_string,
    expect_strings,
    expect_table,
)
from shardkit.strict_json import escape_line

TENSOR = re.compile(rf"{FIELD}\.(?:weight|bias)", re.ASCII)  # of a module
MAX_BYTES = 1 << 20
MAX_DIM = 8  # of a forward argument


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file. Raises RecipeError that names the file and the key."""
    try:
        data = read_small_file(Path(os.path.realpath(path)), MAX_BYTES, RecipeError)
    except RecipeError as error:
        raise RecipeError(f"recipe {error}") from None
    try:
        return parse_recipe(path.stem, data)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def parse_recipe(name: str, data: bytes) -> Recipe:
    """A recipe from its file's bytes. Raises RecipeError that names the key."""
    try:
        return _parse_table(name, hashlib.sha256(data).hexdigest(), tomllib.loads(data.decode()))
    except (RecipeError, ValueError, RecursionError) as error:
        raise RecipeError(escape_line(str(error), 1000)) from None


def _parse_table(name: str, sha256: str, table: dict[str, Any]) -> Recipe:
    if unknown := sorted(table.keys() - KEYS):
        raise RecipeError(f"unknown keys: {', '.join(unknown)}")
    units = dict(parse_units(expect_table(table, "units")))
    counts = dict(parse_counts(expect_table(table, "counts"), units))
    model_types, part_only = expect_strings(table, "model_types"), expect_flag(table, "part_only")
    if not model_types and ("model_types" in table or not part_only):
        raise RecipeError("model_types is missing or empty")
    recipe = Recipe(
        name=name,
        sha256=sha256,
        model_types=model_types,
        rules=tuple(_parse_rules(table, units, counts)),
        units=units,
        counts=counts,
        when=_parse_conditions(expect_table(table, "when"), model_types),
        module_attributes=tuple(_parse_attributes(expect_table(table, "module_attributes"), units)),
        forward_arguments=tuple(_parse_arguments(expect_table(table, "forward_arguments"), units)),
        joint_sums=tuple(parse_joint_sums(expect_table(table, "joint_sums"))),
        parts=tuple(parse_parts(expect_table(table, "parts"))),
        part_only=part_only,
        layer_kinds=parse_layer_kinds(expect_table(table, "layer_kinds")),
        prediction_layers=parse_prediction_layers(expect_table(table, "prediction_layers")),
        expert_modules=_parse_expert_modules(table),
        base_model_prefix=expect_string(table.get("base_model_prefix", ""), "base_model_prefix"),
        notes=expect_string(table.get("notes", ""), "notes"),
    )
    _check_rules(recipe)
    _check_kinds(recipe)
    _check_units(recipe)
    return recipe


def _parse_rules(
    table: dict[str, Any], units: dict[str, UnitRule], counts: dict[str, UnitRule]
) -> Iterator[Rule]:
    """The rules, style by style: those that divide nothing first."""
    styles = STYLES.values()
    for style in (style for style in styles if style.axis == "none"):
        yield from _parse_list(table, style, ())
    for pattern, reason in expect_table(table, "replicated").items():
        why = expect_string(reason, f"replicated.{pattern}")
        yield Rule(check_pattern("replicated", pattern), REPLICATE, reason=why)
    for style in (style for style in styles if style.axis == "vocab"):
        yield from _parse_list(table, style, (Term((), style.axis),))
    flipped, used = set(expect_strings(table, "fan_in_fan_out")), set()
    for style in (style for style in styles if style.axis == "stated"):
        for pattern, entry in expect_table(table, style.name).items():
            key = f"{style.name}.{pattern}"
            text, dim, whole = _read_axis_and_dim(key, entry, style.is_linear, counts)
            terms = _parse_terms(key, text, units, counts)
            check_pattern(style.name, pattern)
            yield Rule(pattern, style, terms, pattern in flipped, dim, whole)
            if style.is_linear and dim is None:
                used.add(pattern)
    if unused := sorted(flipped - used):
        raise RecipeError(f"fan_in_fan_out names no column or row rule: {', '.join(unused)}")


def _parse_list(table: dict[str, Any], style: Style, terms: tuple[Term, ...]) -> Iterator[Rule]:
    for pattern in expect_strings(table, style.name):
        yield Rule(check_pattern(style.name, pattern), style, terms)


def _parse_expert_modules(table: dict[str, Any]) -> tuple[str, ...]:
    patterns = expect_strings(table, "expert_modules")
    return tuple(check_pattern("expert_modules", pattern) for pattern in patterns) or EXPERTS


def _read_axis_and_dim(
    key: str, entry: Any, is_linear: bool, counts: Collection[str]
) -> tuple[Any, int | None, str]:
    """A rule's axis, the dimension that it states, and the count of the one that stays whole."""
    if not isinstance(entry, dict):
        return entry, None, ""
    if not is_linear or entry.keys() not in ({"axis", "dim"}, {"axis", "whole"}):
        raise RecipeError(
            f'{key}: must be "AXIS", or for column or row {{ axis = …, dim = N }} or'
            " { axis = …, whole = COUNT }"
        )
    if "dim" in entry:
        return entry["axis"], _read_dim(key, entry["dim"]), ""
    whole = expect_string(entry["whole"], key)
    if whole not in counts:
        raise RecipeError(f"{key}: {whole!r} is not one of [counts]")
    return entry["axis"], None, whole


def _read_dim(key: str, dim: Any) -> int:
    if type(dim) is not int or not 0 <= dim < MAX_DIM:
        raise RecipeError(f"{key}: dim is {dim!r}, not 0 to {MAX_DIM - 1}")
    return dim


def _check_rules(recipe: Recipe) -> None:
    patterns = Counter(rule.pattern for rule in recipe.rules)
    if twice := sorted(pattern for pattern, times in patterns.items() if times > 1):
        raise RecipeError(f"more than one rule for {', '.join(twice)}")
    for rule in recipe.rules:
        for term in rule.terms if rule.style.divides == "input" else ():
            if term.unit is None or recipe.units[term.unit].shared_by:
                part = term.unit or "a section without a unit"
                raise RecipeError(
                    f"{rule.style.name}.{rule.pattern}: {part} may be held by several ranks, and a"
                    " sum over ranks would count it twice"
                )


def _check_kinds(recipe: Recipe) -> None:
    patterns = [rule.pattern for rule in recipe.rules]
    patterns += [rule.module for rule in recipe.module_attributes]
    patterns += [rule.module for rule in recipe.forward_arguments]
    patterns += [joint.module for joint in recipe.joint_sums]
    named = {kind for pattern in patterns for kind in list_kinds(pattern)}
    if unknown := sorted(named - recipe.layer_kinds.keys()):
        raise RecipeError(f"*[{unknown[0]}]: not one of [layer_kinds]")
    if unused := sorted(recipe.layer_kinds.keys() - named):
        raise RecipeError(f"layer_kinds.{unused[0]}: no pattern names it")


def _check_units(recipe: Recipe) -> None:
    used = {term.unit for rule in recipe.rules for term in rule.terms}
    used |= {unit.shared_by for unit in recipe.units.values()}
    used |= {name for rule in recipe.module_attributes for name in (rule.unit, rule.per_unit)}
    used |= {rule.unit for rule in recipe.forward_arguments} | {"vocab"}
    factors = {name for rule in recipe.rules for term in rule.terms for name in term.counts}
    factors |= {rule.whole for rule in recipe.rules}
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
                key = f"{rule.style.name}.{rule.pattern}"
                raise RecipeError(f"{key}: {term.unit} is not shared_by {term.shared_by}")


def _parse_conditions(
    table: dict[str, Any], model_types: tuple[str, ...]
) -> dict[str, dict[str, object]]:
    for model_type in table:
        if model_type not in model_types:
            raise RecipeError(f"when.{model_type}: not one of model_types")
        check_conditions(expect_table(table, model_type, "when."), f"when.{model_type}")
    return table


def _parse_attributes(
    table: dict[str, Any], units: dict[str, UnitRule]
) -> Iterator[ModuleAttribute]:
    for module, entry in table.items():
        for attribute, text in expect_table(table, module, "module_attributes.").items():
            key = f"module_attributes.{module}.{attribute}"
            names = expect_string(text, key).split("/")
            counted = [name in units and bool(units[name].fields) for name in names]
            tensor = TENSOR.fullmatch(text)
            if not (len(names) < 3 and all(counted)) and text not in units and not tensor:
                raise RecipeError(
                    f"{key}: {text!r} is not a unit, a ratio of two with counts, or MODULE.weight"
                )
            yield ModuleAttribute(check_pattern("module_attributes", module), attribute, *names)
        if not entry:
            raise RecipeError(f"module_attributes.{module}: is empty")


def _parse_arguments(
    table: dict[str, Any], units: dict[str, UnitRule]
) -> Iterator[ForwardArgument]:
    for module in table:
        for argument, entry in expect_table(table, module, "forward_arguments.").items():
            key = f"forward_arguments.{module}.{argument}"
            if not isinstance(entry, dict) or entry.keys() != {"dim", "axis"}:
                raise RecipeError(f"{key}: must be {{ dim = N, axis = UNIT }}")
            words = expect_string(entry["axis"], key).split()
            outer = words[:1] == ["*"]
            if len(words) != 1 + outer or not units.get(words[-1], UnitRule(())).fields:
                axis = entry["axis"]
                raise RecipeError(f"{key}: {axis!r} is not a unit with a count, or '* UNIT'")
            dim = _read_dim(key, entry["dim"])
            yield ForwardArgument(
                check_pattern("forward_arguments", module), argument, dim, words[-1], outer
            )


def _parse_terms(
    key: str, text: Any, units: dict[str, UnitRule], counts: dict[str, UnitRule]
) -> tuple[Term, ...]:
    terms = parse_axis(expect_string(text, key), counts)
    if unknown := sorted({t.unit for t in terms if t.unit and t.unit not in units}):
        raise RecipeError(f"{key}: {', '.join(unknown)} is not a unit; declare it under [units]")
    return terms
