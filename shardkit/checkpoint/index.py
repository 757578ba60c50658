"""`model.safetensors.index.json`: which file holds which tensor, read strictly, written again."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardkit import strict_json
from shardkit.errors import CheckpointError
from shardkit.files import is_plain_name, read_small, real_file
from shardkit.strict_json import shown

SUFFIX = ".safetensors.index.json"
MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Index:
    """An index file: its name, the file each tensor is in, and the strings of its metadata.

    `total_size` is never trusted: real files state floats, zero, or count tied weights twice.
    """

    name: str
    weight_map: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)


def read_index(folder: Path, name: str) -> Index:
    """Read an index.  Raises CheckpointError for anything but a map of tensor to file name."""
    path = real_file(folder, name, CheckpointError)
    try:
        table = strict_json.parse(read_small(path, MAX_BYTES, CheckpointError))
    except strict_json.JsonError as fault:
        raise CheckpointError(f"{folder / name}: damaged index: {fault}; fetch it again") from None
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / name}: damaged index: no weight_map of tensor to file")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise CheckpointError(
                f"{folder / name}: {shown(tensor)} is in {shown(file)}, which is not the name of a"
                " file in this folder"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / name}: {shown(tensor)} is in {shown(file)}, which is no safetensors"
                " file; convert the checkpoint to safetensors first"
            )
    metadata = table.get("metadata")
    texts = metadata if isinstance(metadata, dict) else {}
    return Index(name, weight_map, {k: v for k, v in texts.items() if isinstance(v, str)})


def index_bytes(index: Index, total_size: int) -> bytes:
    """An index as huggingface_hub writes it, with the true `total_size` in bytes."""
    table: dict[str, Any] = {
        "metadata": {**index.metadata, "total_size": total_size},
        "weight_map": index.weight_map,
    }
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()
