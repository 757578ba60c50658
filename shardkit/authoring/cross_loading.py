"""What a model class makes of the checkpoints of another class of its type, measured."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shardkit.checkpoint import Checkpoint
from shardkit.errors import MODEL_ERRORS
from shardkit.runtime.conversion import find_conversions
from shardkit.tensor import generalize_name

TIE = "tie_word_embeddings"
TIE_FIELDS = (TIE, f"text_config.{TIE}")  # of a config, which may tie a head to the embeddings

Place = tuple[str, int, tuple[str, ...]]  # a model's tensor, one of its sources, what is done
Places = Mapping[Place, Sequence[str]]


@dataclass(frozen=True, slots=True)
class CrossLoading:
    """How a class loads a checkpoint of another.

    Attributes:
        names: The tensors that it loads, by their names on disk, numbers as `*`.
        renames: Of these, the ones that its own checkpoints have under other names, and these.
        is_whole: Whether it misses none.
    """

    names: frozenset[str]
    renames: Mapping[str, str]
    is_whole: bool


def load_other(cls: type[PreTrainedModel], folder: Path, own: Path) -> CrossLoading | None:
    """How a class loads a checkpoint, beside one of its own; None if it cannot."""
    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True)
    except MODEL_ERRORS:
        return None
    places = _find_places(model, folder)
    is_whole = not report["missing_keys"] and not report["mismatched_keys"]
    names = frozenset(generalize_name(name) for names in places.values() for name in names)
    return CrossLoading(names, find_renames(places, _find_places(model, own)), is_whole)


def find_renames(theirs: Places, own: Places) -> dict[str, str]:
    """The names that others have for what is elsewhere in a model's own checkpoints, and its own.

    Numbers are `*`, unless names that differ by their numbers alone are renamed differently.
    """
    pairs = {
        (name, other)
        for place, names in theirs.items()
        for name, other in zip(names, own.get(place, ()), strict=False)
    }
    others: defaultdict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        plain, plain_other = map(generalize_name, pair)
        is_alike = _list_numbers(pair[0]) == _list_numbers(pair[1])
        others[plain].add(plain_other if is_alike else pair[1])
        others[plain_other].add(plain if is_alike else pair[0])
    renames = {}
    for name, other in pairs:
        plain, plain_other = generalize_name(name), generalize_name(other)
        if others[plain] == {plain_other} and others[plain_other] == {plain}:
            renames[plain] = plain_other
        else:
            renames[name] = other
    return {name: other for name, other in renames.items() if name != other}


def _list_numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _find_places(model: PreTrainedModel, folder: Path) -> Places:
    """The tensors of a checkpoint that a model loads, by where they go and what is done to them."""
    with Checkpoint(folder) as checkpoint:
        shapes = {spec.name: spec.shape for spec in checkpoint.specs()}
    places: defaultdict[Place, list[str]] = defaultdict(list)
    for conversion in find_conversions(model, shapes):
        converter = conversion.converter
        steps = () if converter is None else tuple(type(op).__name__ for op in converter.operations)
        patterns = list(dict.fromkeys(pattern for _, pattern in conversion.sources))
        for name, pattern in conversion.sources:
            places[conversion.target, patterns.index(pattern), steps].append(name)
    return places


def find_tie_fields(config: Any) -> dict[str, bool] | None:
    """The fields of a config by which heads are tied, if one of them is true, and their defaults.

    Returns:
        No fields if heads are never tied; None if they always are.
    """
    table = config.to_dict()
    fields = [f for f in TIE_FIELDS if isinstance(_find_owner(table, f), dict)]

    def is_tied(values: Mapping[str, bool | None]) -> bool:
        changed = config.to_dict()
        for field, value in values.items():
            owner = _find_owner(changed, field)
            owner.pop(TIE, None)
            if value is not None:
                owner[TIE] = value
        return bool(getattr(type(config).from_dict(changed), TIE, False))

    untied: dict[str, bool | None] = dict.fromkeys(fields, False)
    try:
        if is_tied(untied):
            return None
        telling = [field for field in fields if is_tied({**untied, field: True})]
        return {field: is_tied({**untied, field: None}) for field in telling}
    except Exception:  # whatever a class raises that refuses one of these values
        return {TIE: bool(getattr(config, TIE, False))}


def _find_owner(table: dict[str, Any], field: str) -> Any:
    return table.get(field.rpartition(".")[0]) if "." in field else table
