"""Reads recipe files, strictly: an unknown key, a wrong type or an undeclared unit is an error."""

import hashlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from shardkit.errors import RecipeError
from shardkit.notation import NAME, Term, parse_axis
from shardkit.recipe import LocalArgument, LocalAttribute, Recipe, Rule, Style, UnitRule

LISTS = ("vocab", "replicate", "ignore")
TABLES = ("column", "row")
KEYS = {
    "model_types", "notes", "base_model_prefix", "in_out", "units", "local", "arguments",
    *LISTS, *TABLES,
}  # fmt: skip
MAX_BYTES = 1 << 20
HERE = Path(__file__).parent

assert set(get_args(Style)) == {*LISTS, *TABLES}


def recipe_folder() -> Path:
    """The bundled recipes: inside an installed package, beside it in a checkout."""
    installed = HERE / "recipes"
    return installed if installed.is_dir() else HERE.parent / "recipes"


def bundled() -> list[Path]:
    """Every bundled recipe file, by name."""
    return sorted(recipe_folder().glob("*.toml"))


def find_recipe(model_type: str, name_or_path: str | None = None) -> Recipe:
    """The recipe that serves `model_type`, or the one asked for by name or path.

    Raises RecipeError where there is none: no layout is ever guessed.
    """
    if name_or_path is not None:
        path = Path(name_or_path)
        if path.suffix != ".toml":
            path = recipe_folder() / f"{name_or_path}.toml"
        return load_recipe(path)
    for path in bundled():
        recipe = load_recipe(path)
        if model_type in recipe.model_types:
            return recipe
    known = ", ".join(sorted(t for path in bundled() for t in load_recipe(path).model_types))
    raise RecipeError(
        f"model_type {model_type!r}: no recipe serves it (known: {known});"
        " write one (recipes/README.md) and pass it with --recipe FILE.toml"
    )


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file.  Raises RecipeError that names the file and the key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"recipe {path}: larger than {MAX_BYTES} bytes")
    try:
        table = tomllib.loads(data.decode())
        return _recipe(path.stem, hashlib.sha256(data).hexdigest(), table)
    except (RecipeError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def _recipe(name: str, sha256: str, table: dict[str, Any]) -> Recipe:
    if unknown := sorted(table.keys() - KEYS):
        raise RecipeError(f"unknown keys: {', '.join(unknown)}")
    units = dict(_units(_table(table, "units")))
    in_out = _strings(table, "in_out")
    rules = [Rule(p, style) for style in ("replicate", "ignore") for p in _strings(table, style)]  # type: ignore[arg-type]
    rules += [Rule(p, "vocab", (Term(1, "vocab"),), p in in_out) for p in _strings(table, "vocab")]
    for style in TABLES:
        for pattern, text in _table(table, style).items():
            terms = _terms(f"{style}.{pattern}", text, units)
            rules.append(Rule(pattern, style, terms, pattern in in_out))  # type: ignore[arg-type]
    _check_rules(rules, in_out, units)
    model_types = _strings(table, "model_types")
    if not model_types:
        raise RecipeError("model_types is missing or empty")
    return Recipe(
        name=name,
        sha256=sha256,
        model_types=model_types,
        rules=tuple(rules),
        units=units,
        attributes=tuple(_attributes(_table(table, "local"), units)),
        arguments=tuple(_arguments(_table(table, "arguments"), units)),
        base_model_prefix=_string(table.get("base_model_prefix", ""), "base_model_prefix"),
        notes=_string(table.get("notes", ""), "notes"),
    )


def _check_rules(rules: list[Rule], in_out: tuple[str, ...], units: dict[str, UnitRule]) -> None:
    patterns = [rule.pattern for rule in rules]
    if twice := sorted({p for p in patterns if patterns.count(p) > 1}):
        raise RecipeError(f"more than one rule for {', '.join(twice)}")
    used = {rule.pattern for rule in rules if rule.in_out}
    if unused := sorted(set(in_out) - used):
        raise RecipeError(f"in_out names no column, row or vocab rule: {', '.join(unused)}")
    for rule in rules:
        for term in rule.terms:
            shared = term.unit and term.unit in units and units[term.unit].shared_by
            if rule.style == "row" and (shared or term.unit is None):
                raise RecipeError(
                    f"row.{rule.pattern}: {term.unit or 'a section without a unit'} may be held by"
                    " several ranks, and a sum over ranks would count it twice"
                )


def _units(table: dict[str, Any]) -> Iterator[tuple[str, UnitRule]]:
    yield "vocab", UnitRule(())
    for name, value in table.items():
        if not NAME.fullmatch(name) or name == "vocab":
            raise RecipeError(f"units.{name}: not a name a unit can have")
        entry = value if isinstance(value, dict) else {"count": value}
        if unknown := sorted(entry.keys() - {"count", "shared_by"}):
            raise RecipeError(f"units.{name}: unknown keys: {', '.join(unknown)}")
        count = entry.get("count")
        fields = [count] if isinstance(count, str) else count
        if not isinstance(fields, list) or not fields:
            raise RecipeError(f"units.{name}: must name a config field, or be '*', not {value!r}")
        fields = [_string(f, f"units.{name}") for f in fields]
        shared_by = _string(entry.get("shared_by", ""), f"units.{name}.shared_by")
        if shared_by and shared_by not in table:
            raise RecipeError(f"units.{name}.shared_by: {shared_by!r} is no unit")
        yield name, UnitRule(() if fields == ["*"] else tuple(fields), shared_by)


def _attributes(table: dict[str, Any], units: dict[str, UnitRule]) -> Iterator[LocalAttribute]:
    for module, entry in table.items():
        for attribute, text in _table(table, module).items():
            times, _, per = _string(text, f"local.{module}.{attribute}").partition("/")
            for unit in (times, per):
                if unit and unit not in units:
                    raise RecipeError(f"local.{module}.{attribute}: {unit!r} is no unit")
            yield LocalAttribute(module, attribute, times, per)
        if not entry:
            raise RecipeError(f"local.{module}: is empty")


def _arguments(table: dict[str, Any], units: dict[str, UnitRule]) -> Iterator[LocalArgument]:
    for module in table:
        for argument, entry in _table(table, module).items():
            key = f"arguments.{module}.{argument}"
            if not isinstance(entry, dict) or entry.keys() != {"dim", "axis"}:
                raise RecipeError(f"{key}: must be {{ dim = N, axis = UNIT }}")
            words = _string(entry["axis"], key).split()
            outer = words[:1] == ["*"]
            if len(words) != 1 + outer or words[-1] not in units or type(entry["dim"]) is not int:
                raise RecipeError(f"{key}: {entry['axis']!r} is no unit, nor '* UNIT'")
            yield LocalArgument(module, argument, entry["dim"], words[-1], outer)


def _terms(key: str, text: Any, units: dict[str, UnitRule]) -> tuple[Term, ...]:
    terms = parse_axis(_string(text, key))
    if unknown := sorted({t.unit for t in terms if t.unit and t.unit not in units}):
        raise RecipeError(f"{key}: {', '.join(unknown)} is no unit; declare it under [units]")
    return terms


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise RecipeError(f"{key} must be a table, not {value!r}")
    return value


def _strings(table: dict[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise RecipeError(f"{key} must be a list of names, not {value!r}")
    return tuple(_string(item, key) for item in value)


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{key} must be a string, not {value!r}")
    return value
