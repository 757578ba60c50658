"""Reads config.json, strictly and bounded, into a table."""

from pathlib import Path
from typing import Any

from shardkit import config_fields as fields
from shardkit.errors import CheckpointError
from shardkit.files import read_small_file, resolve_file
from shardkit.strict_json import JsonError, parse_json

MAX_CONFIG = 4 << 20  # bytes; the longest known names 21,000 labels twice, in 2 MB


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, and what a file beside it says of quantization if it does not.

    Raises CheckpointError.
    """
    config = _read_table(folder, "config.json")
    if config is None:
        raise CheckpointError(f"{folder}: no config.json; name the folder of a Hugging Face model")
    tables = (config, *(value for value in config.values() if isinstance(value, dict)))
    if not any(table.get(key) for table in tables for key in fields.QUANTIZATION):
        for name, method in fields.QUANTIZATION_FILES.items():
            if (stated := _read_table(folder, name)) is not None:
                return {**config, fields.QUANTIZATION[0]: {"quant_method": method, **stated}}
    return config


def _read_table(folder: Path, name: str) -> dict[str, Any] | None:
    """A small JSON file; None if it is not there."""
    path = resolve_file(folder, name, CheckpointError)
    if not path.exists():
        return None
    data = read_small_file(path, MAX_CONFIG, CheckpointError)
    try:
        return parse_config(data)
    except JsonError as fault:
        raise CheckpointError(f"{folder}/{name}: {fault}") from None


def parse_config(data: bytes) -> dict[str, Any]:
    """A config from its bytes. Raises JsonError."""
    config = parse_json(data)
    if not isinstance(config, dict):
        raise JsonError("is not a JSON object")
    return config
