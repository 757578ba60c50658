"""Decides which tensors of a checkpoint its model loads, by the rules that transformers has."""

from collections.abc import Mapping, Sequence
from typing import Any

from shardkit import config_fields as fields
from shardkit.checkpoint.config_check import group_layers
from shardkit.errors import CheckpointError
from shardkit.recipe import LoadedTensors, find_loaded_tensors
from shardkit.tensor import TensorTable

TOWER_MODULES = fields.VISION_MODULES | fields.AUDIO_MODULES


def decide_loading(config: Mapping[str, Any], specs: TensorTable) -> LoadedTensors:
    """The class of a checkpoint, and the tensors that it does not load.

    Args:
        config: The contents of config.json.
        specs: The checkpoint's tensors, their names without a wrapper's prefix.

    Raises:
        CheckpointError: If a head is missing that the class in config.json needs: transformers
            would make it up at random.
    """
    single_rows = {each.pattern for each in specs.alike if each.shape[:1] == (1,)}
    loaded = find_loaded_tensors(config, specs.names_by_pattern, single_rows)
    if loaded.missing and loaded.better_class:
        raise CheckpointError(
            f"config.json: architectures names {loaded.model_class}, but there is no tensor of"
            f" {loaded.missing!r}; the tensors are those of {loaded.better_class}: correct"
            " architectures, or fetch the weights of that class"
        )
    extra = list_extra_layers(config, specs.names)
    return LoadedTensors(loaded.model_class, loaded.unloaded | frozenset(extra))


def is_stated(model_class: str, config: Mapping[str, Any]) -> bool:
    """Whether config.json names a class by itself, so that it need not be noted."""
    return config.get("architectures") == [model_class]


def list_extra_layers(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The tensors of layers after the last that a config counts, such as predict further tokens.

    Example:
        >>> list_extra_layers({"num_hidden_layers": 1}, ["layers.0.w", "layers.1.w"])
        ['layers.1.w']
    """
    text = config.get(fields.TEXT_TABLE)
    table = {**config, **text} if isinstance(text, Mapping) else config
    parts = fields.DECODER_LAYERS + fields.ENCODER_LAYERS + fields.LAYER_GROUPS
    counts = [table[key] for key in fields.LAYERS if type(table.get(key)) is int]
    if not counts or any(key in table for key in parts):
        return []
    lists = {
        name: layers
        for name, layers in group_layers(names).items()
        if TOWER_MODULES.isdisjoint(name.split("."))
    }
    longest = max(lists, key=lambda name: sum(lists[name].values()), default="")
    extra = [f"{longest}.{at}." for at in lists.get(longest, ()) if at >= counts[0]]
    return [name for name in names if name.startswith(tuple(extra))] if extra else []
