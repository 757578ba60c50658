"""The counts of heads and groups that a config has, and what a recipe calls what they count."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardkit.authoring.draft.shrink_config import KINDS, field_kind

ANY_FIELD = "*"
SIDES = ("encoder", "decoder", "text", "vision", "audio")


@dataclass(frozen=True)
class UnitCount:
    """A unit's name, the config fields that count it, and the count of the tiny model."""

    name: str
    fields: tuple[str, ...]
    value: int

    @property
    def is_any(self) -> bool:
        """Whether no field counts it: any even division will do."""
        return self.fields == (ANY_FIELD,)


def list_unit_counts(
    config: Mapping[str, Any], aliases: Mapping[str, str], tensor_name: str
) -> list[UnitCount]:
    """The config's counts of heads and groups, the largest first.

    Args:
        config: The config, as config.json has it.
        aliases: Names that the config class also knows some of its fields by.
        tensor_name: Of equal counts, those of the part of the model that this name is in are first.
    """
    fields_by_value: dict[int, list[tuple[int, str]]] = {}
    for field, value in _flatten(config):
        kind = field_kind(field.rpartition(".")[2])
        if kind in ("heads", "kv_heads") and type(value) is int and value > 1:
            distance = _count_foreign_words(field, tensor_name)
            fields_by_value.setdefault(value, []).append((distance, field))
    return [
        UnitCount(name_unit(field), _list_aliases(field, aliases), value)
        for value, fields in sorted(fields_by_value.items(), reverse=True)
        for _, field in sorted(fields)
    ]


def name_unit(field: str) -> str:
    """What to call the unit that a field counts: `heads`, `decoder_heads`, `kv_heads`."""
    *path, last = field.split(".")
    words = [word.removesuffix("_config") for word in path]
    words += [side for side in SIDES if last.startswith(f"{side}_")]
    if last.startswith(("num_decoder", "num_encoder")):
        words.append(last.split("_")[1])
    return "_".join([*dict.fromkeys(words), field_kind(last)]).lower()


def is_kv_count(count: UnitCount) -> bool:
    """Whether a count's field is named as those of kv heads are."""
    return KINDS["kv_heads"].fullmatch(count.fields[0]) is not None


def _count_foreign_words(field: str, tensor_name: str) -> int:
    """How many words of a field name parts of a model that the tensor's name does not have."""
    *path, _ = field.split(".")
    words = [word for word in field.split("_")[:1] if word in SIDES]
    words += [word.removesuffix("_config") for word in path]
    return sum(word not in tensor_name for word in words)


def _list_aliases(field: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """A field, and the other names by which config files of this type may have it."""
    if "." in field:
        return (field,)
    names = {aliases.get(field, field)}
    names |= {alias for alias, name in aliases.items() if name == field}
    return (field, *sorted(names - {field}))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
