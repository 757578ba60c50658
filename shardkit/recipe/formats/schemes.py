"""What a config says of quantization, wherever it says it, as formats with their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardkit import config_fields as fields
from shardkit.errors import RecipeError
from shardkit.recipe.formats.format import WHOLE, Format, Scheme, list_formats
from shardkit.strict_json import quote

Statement = Mapping[str, Any]


def find_schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes that the tensors of a checkpoint may be of; which, the tensors tell.

    Args:
        config: The contents of config.json, with what stands beside it.

    Raises:
        RecipeError: If the config names a quantization that no format describes, or one that
            cannot be split.
    """
    schemes: list[Scheme] = []
    faults: list[str] = []
    for statement in _list_statements(config):
        fitting = [each for each in list_formats() if _is_of(statement, each)]
        for each in fitting:
            if each.refuse:
                raise RecipeError(f"config.json: {each.title}: {each.refuse}")
        if not fitting:
            faults.append(_describe_unknown(statement))
        for each in fitting:
            try:
                scheme = make_scheme(each, statement)
            except RecipeError as fault:
                faults.append(str(fault))
                continue
            if scheme not in schemes:
                schemes.append(scheme)
    if faults and not schemes:
        raise RecipeError(f"config.json: {faults[0]}")
    return tuple(schemes)


def make_scheme(each: Format, statement: Statement) -> Scheme:
    """A format with the numbers that a config states for it. Raises RecipeError if one lacks."""
    numbers = {name: _find_number(name, values, statement) for name, values in each.numbers.items()}
    return Scheme(each, numbers)


def _find_number(name: str, values: Sequence[int | str], statement: Statement) -> int | None:
    for value in values:
        if value == WHOLE:
            return None
        number = value if isinstance(value, int) else _read(statement, value)
        if type(number) is int and number > 0:
            return number
        if number == -1:  # as GPTQ writes a group that is the whole row
            return None
    raise RecipeError(f"quantization_config has no {name} ({' or '.join(map(str, values))})")


def _list_statements(config: Mapping[str, Any]) -> Iterator[Statement]:
    """Each distinct thing that a config says of quantized weights, flat."""
    statements: list[Statement] = []
    for table in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in fields.QUANTIZATION:
            if isinstance(stated := table.get(key), Mapping):
                for statement in _flatten(stated):
                    if statement not in statements:
                        statements.append(statement)
                        yield statement


def _flatten(stated: Statement) -> Iterator[Statement]:
    """What is said of all modules, after one statement for each group of them."""
    inner = stated.get("quantization")
    base = {**stated, **inner} if isinstance(inner, Mapping) else dict(stated)
    base = {key: value for key, value in base.items() if key not in fields.QUANTIZED_LISTS}
    if "quant_algo" in base and not base.get("quant_method"):
        base["quant_method"] = "modelopt"
    source = inner if isinstance(inner, Mapping) else stated
    groups, layers = source.get("config_groups"), source.get("quantized_layers")
    parts: list[Statement] = []
    if isinstance(layers, Mapping):
        parts = [each for each in layers.values() if isinstance(each, Mapping)]
    elif isinstance(groups, Mapping):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                form = {"format": group["format"]} if group.get("format") else {}
                parts.append({**weights, **form})
    distinct: list[Statement] = []
    for part in parts:
        if part not in distinct:
            distinct.append(part)
    yield from ({**base, **part} for part in distinct)
    yield base


def _is_of(statement: Statement, each: Format) -> bool:
    """Whether a format's fields have the values that a statement gives them."""
    return all(_read(statement, key) in values for key, values in each.when.items()) and not any(
        _read(statement, key) in values for key, values in each.unless.items()
    )


def _read(statement: Statement, field: str) -> Any:
    """A field's value, or an item's (`weight_block_size.0`); None if there is none."""
    name, _, at = field.partition(".")
    value = statement.get(name)
    if not at:
        return value
    return value[int(at)] if isinstance(value, list) and int(at) < len(value) else None


def _describe_unknown(statement: Statement) -> str:
    stated = [
        f"{key} {quote(statement[key])}"
        for key in ("quant_method", "format", "quant_algo", "num_bits", "bits")
        if statement.get(key) is not None
    ]
    return (
        f"no format describes a quantization of {', '.join(stated) or 'no quant_method'};"
        " `shardkit recipes` lists those that are known"
    )
