"""The config a model is built from: read strictly, checked against its tensors, made inert.

No config.json reaches a class of transformers but through here.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.agreement import check_config
from shardkit.checkpoint.listing import read_config
from shardkit.errors import CheckpointError
from shardkit.tensor import TensorSpec

# What makes transformers run code, or load other files or kernels than the folder's weights.
ACTIVE = {"auto_map", "trust_remote_code", "transformers_weights", "custom_pipelines",
          "use_kernels", "kernel_config"}  # fmt: skip


def model_config(folder: Path, specs: Sequence[TensorSpec] = ()) -> PreTrainedConfig:
    """The config of a folder, for a model of these whole tensors.

    Raises CheckpointError for one that they contradict, or that no class takes.
    """
    table = inert(read_config(folder))
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


def source_config(folder: Path) -> PreTrainedConfig:
    """The config of an unsharded checkpoint's folder.  Raises CheckpointError."""
    with Checkpoint(folder) as checkpoint:
        return model_config(folder, checkpoint.specs())


def check_buildable(folder: Path) -> None:
    """Raise CheckpointError for a config, without weights, that should not reach a model's class.

    For a builder that reads the folder itself: what it would run or fetch is refused, not left out.
    """
    model_config(folder)
    if kernel := next(_kernels(read_config(folder)), None):
        raise CheckpointError(
            f"{folder}/config.json: {kernel} names a kernel to fetch; remove the field"
        )


def _kernels(table: dict[str, Any]) -> Iterator[str]:
    """The fields that name an implementation on the Hub, which is code."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _kernels(value)
        if "implementation" in key and "/" in str(value):
            yield key


def inert(value: Any) -> Any:
    """A JSON value without the fields, however deep, that would make transformers run or fetch."""
    if isinstance(value, dict):
        return {key: inert(inner) for key, inner in value.items() if not _acts(key)}
    return [inert(inner) for inner in value] if isinstance(value, list) else value


def _acts(key: str) -> bool:
    return key in ACTIVE or "implementation" in key
