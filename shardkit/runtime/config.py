"""The config a model is built from: read strictly, checked against its tensors, made inert.

No config.json reaches a class of transformers but through here.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.config_check import check_config
from shardkit.checkpoint.weight_files import read_config
from shardkit.errors import CheckpointError
from shardkit.tensor import TensorSpec

# What makes transformers run code, or load other files or kernels than the folder's weights.
ACTIVE = {"auto_map", "trust_remote_code", "transformers_weights", "custom_pipelines",
          "use_kernels", "kernel_config"}  # fmt: skip


def build_config(folder: Path, specs: Sequence[TensorSpec] = ()) -> PreTrainedConfig:
    """The config of a folder, for a model of these whole tensors.

    Raises CheckpointError for one that they contradict, or that no class takes.
    """
    table = remove_active_fields(read_config(folder))
    check_config(table, specs, folder)
    with tempfile.TemporaryDirectory(prefix="shardkit-") as apart:
        (Path(apart) / "config.json").write_text(json.dumps(table))
        try:
            config = AutoConfig.from_pretrained(apart, trust_remote_code=False)
        except Exception as fault:  # a config class raises whatever its fields lead it to
            told = str(fault).split("\n")[0] or type(fault).__name__
            raise CheckpointError(f"{folder}/config.json: no model can have it: {told}") from None
    assert isinstance(config, PreTrainedConfig)
    config._name_or_path = str(folder)
    return config


def read_source_config(folder: Path) -> PreTrainedConfig:
    """The config of an unsharded checkpoint's folder.  Raises CheckpointError."""
    with Checkpoint(folder) as checkpoint:
        return build_config(folder, checkpoint.specs())


def remove_active_fields(value: Any) -> Any:
    """A JSON value without the fields, however deep, that would make transformers run or fetch."""
    if isinstance(value, dict):
        return {
            key: remove_active_fields(inner) for key, inner in value.items() if not _is_active(key)
        }
    return [remove_active_fields(inner) for inner in value] if isinstance(value, list) else value


def _is_active(key: str) -> bool:
    return key in ACTIVE or "implementation" in key
