"""The config a model is built from: read strictly, checked against its tensors, made inert.

No config.json reaches a class of transformers but through here.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from shardkit import config_fields as fields
from shardkit.checkpoint import Checkpoint, check_config, parse_config, read_config
from shardkit.errors import CheckpointError, ManifestError, first_line
from shardkit.files import write_all
from shardkit.planning import decide_loading
from shardkit.recipe.formats import group_checkpoint, is_plain, list_weights
from shardkit.shards import Manifest, read_companion
from shardkit.strict_json import JsonError
from shardkit.tensor import TensorSpec

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# What makes transformers run code, or load other files or kernels than the folder's weights.
ACTIVE = {"auto_map", "trust_remote_code", "transformers_weights", "custom_pipelines",
          "use_kernels", "kernel_config"}  # fmt: skip

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShardConfigs:
    """The configs of a shard folder as tables; `generation` is None if the source has none."""

    config: Table
    generation: Table | None = None


def read_shard_configs(folder: Path, manifest: Manifest) -> ShardConfigs:
    """The configs that were copied beside the shards, their bytes checked. Raises ManifestError."""
    return ShardConfigs(
        _read_table(folder, manifest, CONFIG),
        _read_table(folder, manifest, GENERATION_CONFIG)
        if GENERATION_CONFIG in manifest.companion_files
        else None,
    )


def read_source_config(folder: Path) -> PreTrainedConfig:
    """The config of an unsharded checkpoint's folder, its class decided. Raises CheckpointError."""
    with Checkpoint(folder) as checkpoint:
        table, prefix = checkpoint.config, checkpoint.wrapper_prefix
        specs = list_weights(checkpoint.specs(), group_checkpoint(checkpoint.specs(), table))
    loaded = decide_loading(table, specs.without_prefix(prefix))
    if loaded.model_class:
        table = {**table, "architectures": [loaded.model_class]}
    return build_config(table, specs, folder)


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder that may have no weights. Raises CheckpointError."""
    return build_config(read_config(folder), (), folder)


def build_config(
    table: Mapping[str, Any], specs: Sequence[TensorSpec], folder: Path
) -> PreTrainedConfig:
    """The config that a table of config.json makes.

    transformers reads it from a file in memory, so that what its AutoConfig makes of a table
    stays its own matter.

    Args:
        table: What config.json says.
        specs: The whole tensors of the model, to check it against.
        folder: The folder it is of, which errors and the config name.

    Raises:
        CheckpointError: If the tensors contradict it, or transformers cannot build a config.
    """
    inert = remove_active_fields(table)
    check_config(inert, specs, folder)
    if specs and all(is_plain(spec) for spec in specs):
        inert = {key: value for key, value in inert.items() if key not in fields.QUANTIZATION}
    fd = os.memfd_create(CONFIG, os.MFD_CLOEXEC)
    try:
        write_all(fd, json.dumps(inert).encode())
        config = AutoConfig.from_pretrained(f"/proc/self/fd/{fd}", trust_remote_code=False)
    except Exception as fault:  # a config class raises whatever its fields lead it to
        raise CheckpointError(
            f"{folder}/{CONFIG}: transformers cannot build a model from this config:"
            f" {first_line(fault)}"
        ) from None
    finally:
        os.close(fd)
    assert isinstance(config, PreTrainedConfig)
    config.name_or_path = str(folder)
    return config


def remove_active_fields(value: Any) -> Any:
    """A JSON value without the fields, however deep, that would make transformers run or fetch."""
    if isinstance(value, dict):
        return {
            key: remove_active_fields(inner) for key, inner in value.items() if not _is_active(key)
        }
    return [remove_active_fields(inner) for inner in value] if isinstance(value, list) else value


def _is_active(key: str) -> bool:
    return key in ACTIVE or "implementation" in key


def _read_table(folder: Path, manifest: Manifest, name: str) -> Table:
    if name not in manifest.companion_files:
        raise ManifestError(f"{folder}: the manifest lists no {name}; split the source again")
    try:
        return parse_config(read_companion(folder, manifest, name))
    except JsonError as fault:
        raise ManifestError(f"{folder / name}: {fault}") from None
