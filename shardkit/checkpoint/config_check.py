"""Does a config.json agree with the tensors beside it, and is it safe to build a model from?

A config is a few numbers that decide how much is built: loops over layers, tables of positions.
Each is held to what the tensors prove, or to a cap, before any of it reaches a model's class.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shardkit import config_fields as fields
from shardkit.dtypes import DTYPES
from shardkit.errors import CheckpointError
from shardkit.strict_json import quote
from shardkit.tensor import TensorSpec, TensorTable

Config = Mapping[str, Any]
# How many tensors each module of a list has, by the list's name and the module's number.
ModuleLists = Mapping[str, Mapping[int, int]]

MAX_LAYERS = 10_000
MANY = 1000  # layers, experts or labels that need no proof: a model's class makes them in a second
MAX_SIZE = 1 << 24  # a size that no tensor proves: the longest tables of positions have 10 million
POSITIVE = frozenset(
    fields.LAYERS + fields.DECODER_LAYERS + fields.ENCODER_LAYERS + fields.LAYER_GROUPS
    + fields.DEPTH + fields.HIDDEN_SIZE + fields.VOCAB_SIZE + fields.HEAD_DIM[:1] + fields.HEADS
    + fields.DECODER_HEADS + fields.ENCODER_HEADS + fields.KV_HEADS
)  # fmt: skip
TOWER_MODULES = fields.VISION_MODULES | fields.AUDIO_MODULES
# A name up to the number of the first list of modules that it is in.
FIRST_NUMBER = re.compile(r"[^.]+(?:\.(?!\d{1,9}(?![^.]))[^.]+)*\.\d{1,9}(?![^.])")
REPEATED = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages?)$")
INTEGER_KINDS = ("int", "bool")
LISTED = re.compile(r"experts$|num_labels")
# Numbers that are computed with, and size nothing.
FACTORS = re.compile(r"theta|base|param|flop|seed|trained|hash")


def check_config(config: Config, specs: Sequence[TensorSpec], where: object) -> None:
    """Raise CheckpointError naming the first field of a config that its tensors contradict.

    `specs` are the whole tensors; without any, every number is held to a cap. `where` is the
    folder, for the message.
    """
    table = TensorTable.of(specs)
    check_numbers(config, table, where)
    try:
        if table:
            lists = _group_layers(table)
            _check_hidden(config, table, lists)
            _check_layers(config, lists)
            _check_dtypes(config, table)
    except _Disagreement as fault:
        raise CheckpointError(f"{where}/config.json: {fault}") from None


def check_numbers(config: Config, specs: Sequence[TensorSpec], where: object) -> None:
    """Raise CheckpointError naming the first number of a config that is no size of any model.

    It needs to know nothing of the model, and so it says nothing wrong of an unknown one.
    """
    try:
        _check_numbers(config, TensorTable.of(specs))
    except _Disagreement as fault:
        raise CheckpointError(f"{where}/config.json: {fault}") from None


class _Disagreement(ValueError):
    """What a config says and the tensors do not."""


def _check_numbers(config: Config, specs: TensorTable) -> None:
    largest = max((size for spec in specs.examples for size in spec.shape), default=0)
    most = min(max(MANY, len(specs)), MAX_LAYERS)
    for key in fields.LAYERS:
        if isinstance(value := _text_fields(config).get(key), list | dict):
            raise _Disagreement(f"{key} is {quote(value)}, not a count")
    # Of a latent attention, the width of a head may be that of its positions: 0 without any.
    is_without = any(_text_fields(config).get(key) == 0 for key in fields.ROPE_KEY)
    positive = POSITIVE.difference(fields.HEAD_DIM) if is_without else POSITIVE
    for key, value in _iter_values(config):
        if key in positive and value is not None:
            _check_range(key, value, 1, MAX_SIZE if largest < MAX_SIZE else largest)
        if type(value) is not int or FACTORS.search(key):
            continue
        if REPEATED.search(key):
            _check_range(key, value, -most, most)
        elif LISTED.search(key):
            _check_range(key, value, -MANY, max(MANY, largest))
        else:
            _check_range(key, value, -MAX_SIZE, max(MAX_SIZE, largest))


def _check_range(key: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise _Disagreement(f"{key} is {quote(value)}, not an integer of {least} to {most}")


def _iter_values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a table or list, and the key it is under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _iter_values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _iter_values(inner, key)
    else:
        yield key, value


def _check_hidden(config: Config, specs: TensorTable, lists: ModuleLists) -> None:
    if lists and all(TOWER_MODULES & set(name.split(".")) for name in lists):
        return  # a tower without its language model
    sizes = {size for spec in specs.examples for size in spec.shape}
    for key, stated in _read_counts(_text_fields(config), fields.HIDDEN_SIZE):
        if stated not in sizes:
            raise _Disagreement(f"{key} is {stated}, but no tensor has a dimension of that size")


def _check_layers(config: Config, lists: ModuleLists) -> None:
    """Each count of layers against the list of layers it is of: none missing, none too many."""
    text = _text_fields(config)
    towers = [config[key] for key in fields.TOWER_TABLES if key in config]
    in_towers = {n: at for n, at in lists.items() if TOWER_MODULES & set(n.split("."))}
    in_text = {n: at for n, at in lists.items() if n not in in_towers or not towers}
    in_decoder = {n: at for n, at in in_text.items() if "decoder" in n.split(".")}
    elsewhere = {n: at for n, at in in_text.items() if n not in in_decoder}
    predicting = sum(count for _, count in _read_counts(text, fields.PREDICTION_LAYERS))
    _check_list(_read_counts(text, fields.DECODER_LAYERS), in_decoder, 0)
    names = fields.LAYERS_PER_STACK + fields.LAYER_GROUPS + fields.LAYERS
    counts = _read_counts(text, names) or _count_layer_types(text)
    if encoder_counts := _read_counts(text, fields.ENCODER_LAYERS):
        _check_list(encoder_counts, elsewhere, 0)
    elif counts:
        has_decoder = "num_decoder_layers" in text
        _check_list(counts[:1], elsewhere if has_decoder else in_text, predicting)
    if len(towers) == 1 and isinstance(towers[0], Mapping):
        _check_list(_read_counts(towers[0], fields.LAYERS + fields.DEPTH)[:1], in_towers, 0)


def _check_list(counts: Iterable[tuple[str, int]], lists: ModuleLists, extra: int) -> None:
    """Compare a count with some lists: one is as long, or else it is of that of the most tensors.

    A checkpoint of one half of a model has none of the other half's. A tower whose config has an
    unusual name is among the lists, and may have more tensors than the text.
    """
    for key, count in counts:
        if not lists:
            return
        name = max(lists, key=lambda name: sum(lists[name].values()))
        layers = lists[name]
        least = sum(layers.values()) / len(layers) / 2  # tensors in a layer: fewer are of no model
        alike = [at for at in lists.values() if sum(at.values()) >= least * len(at)]
        if any(count <= len(at) == max(at) + 1 <= count + extra for at in alike):
            continue
        missing = next((at for at in range(count) if at not in layers), None)
        if missing is not None:
            raise _Disagreement(
                f"{key} is {count}, but there is no tensor of {quote(f'{name}.{missing}')}:"
                " fetch the weights again, or correct the config"
            )
        if max(layers) >= count + extra:
            raise _Disagreement(
                f"{key} is {count}, but there are tensors of {quote(f'{name}.{max(layers)}')}"
            )


def group_layers(names: Iterable[str]) -> dict[str, dict[int, int]]:
    """The lists of modules that tensors are in, by the name before the first number of theirs.

    Of each list, how many tensors each number has.
    """
    places = Counter(match[0] for name in names if (match := FIRST_NUMBER.match(name)))
    lists: dict[str, dict[int, int]] = {}
    for place, count in places.items():
        name, _, number = place.rpartition(".")
        lists.setdefault(name, {})[int(number)] = count
    return lists


def _group_layers(table: TensorTable) -> dict[str, dict[int, int]]:
    """As `group_layers`: alike names have the number at one place, so that none is searched."""
    lists: dict[str, Counter[int]] = {}
    for each in table.alike:
        words = each.pattern.split(".")
        at = next((at for at, word in enumerate(words) if at and word == "*"), 0)
        cut = len(".".join(words[:at])) + 1
        numbers = Counter(name[cut:].partition(".")[0] for name in each.names) if at else {}
        if words[0] == "*" or not all(map(str.isdecimal, numbers)):
            for name, layers in group_layers(each.names).items():
                lists.setdefault(name, Counter()).update(layers)
        elif at:
            counts = {int(number): count for number, count in numbers.items()}
            lists.setdefault(".".join(words[:at]), Counter()).update(counts)
    return {name: dict(layers) for name, layers in lists.items()}


def _check_dtypes(config: Config, specs: TensorTable) -> None:
    """Integers in place of a weight or a bias need a config that says how they are quantized."""
    tables = (config, _text_fields(config))
    if any(table.get(key) for table in tables for key in fields.QUANTIZATION):
        return
    if not any(DTYPES[spec.dtype].kind in INTEGER_KINDS for spec in specs.examples):
        return
    for spec in specs:
        weighs = spec.name.endswith(".weight") or (
            spec.name.endswith(".bias") and len(spec.shape) == 1
        )
        if weighs and DTYPES[spec.dtype].kind in INTEGER_KINDS:
            raise _Disagreement(
                f"has no quantization_config, but {quote(spec.name)} is {spec.dtype}:"
                " fetch the weights again, or add what they were quantized with"
            )


def _text_fields(config: Config) -> Config:
    """The fields of the language model, nested or not."""
    text = config.get(fields.TEXT_TABLE)
    return {**config, **text} if isinstance(text, Mapping) else config


def _read_counts(config: Config, keys: Iterable[str]) -> list[tuple[str, int]]:
    return [(key, config[key]) for key in keys if type(config.get(key)) is int]


def _count_layer_types(config: Config) -> list[tuple[str, int]]:
    """The count of layers if each is listed, and they are not counted."""
    lists = ((f"the length of {key}", config.get(key)) for key in fields.LAYER_TYPES)
    return [(key, len(value)) for key, value in lists if isinstance(value, list)]
