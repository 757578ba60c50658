"""Does a config.json agree with the tensors beside it, and is it safe to build a model from?

A config is a few numbers that decide how much is built: loops over layers, tables of positions.
Each is held to what the tensors prove, or to a cap, before any of it reaches a model's class.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shardkit.errors import CheckpointError
from shardkit.strict_json import quote
from shardkit.tensor import TensorSpec

Config = Mapping[str, Any]

MAX_LAYERS = 10_000
MANY = 1000  # layers, experts or labels that need no proof: a model's class makes them in a second
MAX_SIZE = 1 << 24  # a size that no tensor proves: the longest tables of positions have 10 million
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN = ("hidden_size", "d_model", "n_embd", "n_embed")
POSITIVE = {
    *LAYERS, *HIDDEN, "vocab_size", "head_dim", "num_attention_heads", "n_head", "n_heads",
    "num_heads", "num_key_value_heads", "num_kv_heads", "encoder_layers", "decoder_layers",
    "encoder_attention_heads", "decoder_attention_heads", "num_encoder_layers",
    "num_decoder_layers", "num_hidden_groups", "depth",
}  # fmt: skip
# Layers that only predict further tokens are stored after the last that the config counts.
PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Towers beside the model of text, and the tables of a config that they are in.
TOWERS = ("vision_config", "audio_config")
TOWER = {"vision_tower", "vision_model", "vision_encoder", "visual", "audio_tower", "audio_model"}
REPEATED = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages?)$")
LAYER_TYPES = ("layers_block_type", "layer_types")
LISTED = re.compile(r"experts$|num_labels")
# Numbers that are computed with, and size nothing.
FACTORS = re.compile(r"theta|base|param|flop|seed|trained|hash")
INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
QUANTIZED = ("quantization_config", "compression_config")


def check_config(config: Config, specs: Sequence[TensorSpec], where: object) -> None:
    """Raise CheckpointError naming the first field of a config that its tensors contradict.

    `specs` are the whole tensors; without any, every number is held to a cap.  `where` is the
    folder, for the message.
    """
    try:
        _check_numbers(config, specs)
        if specs:
            _check_hidden(config, specs)
            _check_layers(config, specs)
            _check_dtypes(config, specs)
    except _Disagreement as fault:
        raise CheckpointError(f"{where}/config.json: {fault}") from None


class _Disagreement(ValueError):
    """What a config says and the tensors do not."""


def _check_numbers(config: Config, specs: Sequence[TensorSpec]) -> None:
    largest = max((size for spec in specs for size in spec.shape), default=0)
    most = min(max(MANY, len(specs)), MAX_LAYERS)
    for key in LAYERS:
        if isinstance(value := _text_fields(config).get(key), list | dict):
            raise _Disagreement(f"{key} is {quote(value)}, not a count")
    for key, value in _iter_values(config):
        if key in POSITIVE and value is not None:
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
    """Every value that is no table or list, and the key it is under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _iter_values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _iter_values(inner, key)
    else:
        yield key, value


def _check_hidden(config: Config, specs: Sequence[TensorSpec]) -> None:
    sizes = {size for spec in specs for size in spec.shape}
    for key, stated in _read_counts(_text_fields(config), HIDDEN):
        if stated not in sizes:
            raise _Disagreement(f"{key} is {stated}, but no tensor has a dimension of that size")


def _check_layers(config: Config, specs: Sequence[TensorSpec]) -> None:
    """Each count of layers against the list of layers it is of: none missing, none too many."""
    text, towers = _text_fields(config), [config[key] for key in TOWERS if key in config]
    lists = group_layers(spec.name for spec in specs)
    beside = {n: at for n, at in lists.items() if TOWER & set(n.split("."))}
    reading = {n: at for n, at in lists.items() if n not in beside or not towers}
    decoding = {n: at for n, at in reading.items() if "decoder" in n.split(".")}
    others = {n: at for n, at in reading.items() if n not in decoding}
    further = sum(count for _, count in _read_counts(text, PREDICTION_LAYERS))
    _check_list(_read_counts(text, ("decoder_layers", "num_decoder_layers")), decoding, 0)
    if counts := _read_counts(text, ("encoder_layers", "num_encoder_layers")):
        _check_list(counts, others, 0)
    elif counts := _read_counts(text, ("num_hidden_groups", *LAYERS)) or _count_layer_types(text):
        _check_list(counts[:1], others if "num_decoder_layers" in text else reading, further)
    if len(towers) == 1 and isinstance(towers[0], Mapping):
        _check_list(_read_counts(towers[0], (*LAYERS, "depth"))[:1], beside, 0)


def _check_list(
    counts: Iterable[tuple[str, int]], lists: Mapping[str, Mapping[int, int]], further: int
) -> None:
    """Compare a count with the longest of some lists: the one of the most tensors.

    A checkpoint of one half of a model has none of the other half's.
    """
    for key, count in counts:
        if not lists:
            return
        name = max(lists, key=lambda name: sum(lists[name].values()))
        found = lists[name]
        missing = next((at for at in range(count) if at not in found), None)
        if missing is not None:
            raise _Disagreement(
                f"{key} is {count}, but there is no tensor of {quote(f'{name}.{missing}')}:"
                " fetch the weights again, or correct the config"
            )
        if max(found) >= count + further:
            raise _Disagreement(
                f"{key} is {count}, but there are tensors of {quote(f'{name}.{max(found)}')}"
            )


def group_layers(names: Iterable[str]) -> dict[str, dict[int, int]]:
    """The lists of modules that tensors are in, by the name before the first number of theirs.

    Of each list, how many tensors each number has.
    """
    lists: dict[str, dict[int, int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((at for at, part in enumerate(parts) if part.isdecimal() and len(part) < 10), 0)
        if at:
            found = lists.setdefault(".".join(parts[:at]), {})
            found[int(parts[at])] = found.get(int(parts[at]), 0) + 1
    return lists


def _check_dtypes(config: Config, specs: Sequence[TensorSpec]) -> None:
    """Integers in place of a weight or a bias need a config that says how they are quantized."""
    if any(table.get(key) for table in (config, _text_fields(config)) for key in QUANTIZED):
        return
    for spec in specs:
        weighs = spec.name.endswith(".weight") or (
            spec.name.endswith(".bias") and len(spec.shape) == 1
        )
        if weighs and spec.dtype in INTEGERS:
            raise _Disagreement(
                f"has no quantization_config, but {quote(spec.name)} is {spec.dtype}:"
                " fetch the weights again, or add what they were quantized with"
            )


def _text_fields(config: Config) -> Config:
    """The fields of the model of text, nested or not."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _read_counts(config: Config, keys: Iterable[str]) -> list[tuple[str, int]]:
    return [(key, config[key]) for key in keys if type(config.get(key)) is int]


def _count_layer_types(config: Config) -> list[tuple[str, int]]:
    """The count of layers where each is listed, and they are not counted."""
    lists = ((f"the length of {key}", config.get(key)) for key in LAYER_TYPES)
    return [(key, len(value)) for key, value in lists if isinstance(value, list)]
