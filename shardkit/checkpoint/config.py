"""Reads config.json, strictly and bounded, into a table."""

from pathlib import Path
from typing import Any

from shardkit.errors import CheckpointError
from shardkit.files import read_small_file, resolve_file
from shardkit.strict_json import JsonError, parse_json

MAX_CONFIG = 4 << 20  # bytes; the longest known names 21,000 labels twice, in 2 MB


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises CheckpointError."""
    path = resolve_file(folder, "config.json", CheckpointError)
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json; name the folder of a Hugging Face model")
    data = read_small_file(path, MAX_CONFIG, CheckpointError)
    try:
        return parse_config(data)
    except JsonError as fault:
        raise CheckpointError(f"{folder}/config.json: {fault}") from None


def parse_config(data: bytes) -> dict[str, Any]:
    """A config from its bytes. Raises JsonError."""
    config = parse_json(data)
    if not isinstance(config, dict):
        raise JsonError("is not a JSON object")
    return config
