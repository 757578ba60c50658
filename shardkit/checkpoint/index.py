"""`model.safetensors.index.json`: which file holds which tensor, read strictly, written again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardkit import strict_json
from shardkit.errors import CheckpointError
from shardkit.files import is_plain_name, read_small_file, resolve_file
from shardkit.strict_json import JsonError, count_strings, quote

WEIGHTS = ".safetensors"
SUFFIX = f"{WEIGHTS}.index.json"
MAX_BYTES = 64 << 20  # the longest known, of 210 000 tensors, has 25 MB
MAX_VALUES = 2_000_000
MAX_COUNT = 1 << 62


@dataclass(frozen=True, slots=True)
class Index:
    """An index file: its name, the file each tensor is in, and its metadata's strings and counts.

    `total_size` is never trusted: real files state floats, zero, or count tied weights twice.
    """

    name: str
    weight_map: dict[str, str]
    metadata: dict[str, str | int] = field(default_factory=dict)
    total_size: object = field(default=None, compare=False)


def read_index(folder: Path, name: str, suffix: str = WEIGHTS) -> Index:
    """Read an index of files of one kind, safetensors unless another is asked for.

    Raises CheckpointError for anything but a map of tensor to file name.
    """
    data = read_small_file(resolve_file(folder, name, CheckpointError), MAX_BYTES, CheckpointError)
    try:
        return parse_index(data, name, suffix)
    except JsonError as fault:
        raise CheckpointError(f"{folder / name}: {fault}") from None


def parse_index(data: bytes, name: str, suffix: str = WEIGHTS) -> Index:
    """An index from its bytes. Raises JsonError."""
    try:
        table = strict_json.parse_json(data, MAX_VALUES, _count_strings)
    except JsonError as fault:
        raise JsonError(f"damaged index: {fault}; fetch it again") from None
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise JsonError("damaged index: no weight_map of tensor to file")
    names: set[str] = set()  # that are sound: a hundred thousand tensors are in a few hundred files
    for tensor, file in weight_map.items():
        if isinstance(file, str) and file in names:
            continue
        if not isinstance(file, str) or not is_plain_name(file):
            raise JsonError(
                f"{quote(tensor)} is in {quote(file)}, which is not the name of a file in this"
                " folder"
            )
        if not file.endswith(suffix):
            raise JsonError(
                f"{quote(tensor)} is in {quote(file)}, which is no *{suffix} file; convert the"
                " checkpoint to safetensors first"
            )
        names.add(file)
    stated = table.get("metadata")
    metadata = stated if isinstance(stated, dict) else {}
    return Index(name, weight_map, _keep_metadata(metadata), metadata.get("total_size"))


def _count_strings(table: Any) -> int:
    """How many strings an index has, keys included, if all in it is as it must be."""
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        return 0
    return 2 * len(table["weight_map"]) + count_strings({**table, "weight_map": 0})


def check_index(index: Index, files: Mapping[str, str], is_whole: bool, folder: Path) -> None:
    """Raise CheckpointError if an index and the files that it is of do not agree.

    An index that only says otherwise than the files of a whole set is old, and does no harm. One
    that names a tensor which no file has may be right, and the files incomplete.

    Args:
        index: What it says.
        files: The file that each tensor is in.
        is_whole: Whether the files are a whole set by their names.
        folder: Where they are, for the message.
    """
    if index.weight_map == files:
        return
    where, delete = folder / index.name, ""
    if is_whole:
        delete = ", or delete the index if it is older than the files"
    for tensor, file in index.weight_map.items():
        if files.get(tensor) != file and not (tensor in files and is_whole):
            raise CheckpointError(
                f"{where}: says {quote(tensor)} is in {file}, but it is in"
                f" {files.get(tensor, 'no file')}; fetch it again{delete}"
            )
    extra = sorted(files.keys() - index.weight_map.keys())
    if extra and not is_whole:
        raise CheckpointError(
            f"{where}: does not name {quote(extra[0])}, which is in {files[extra[0]]};"
            " fetch it again"
        )


def _keep_metadata(metadata: dict[str, Any]) -> dict[str, str | int]:
    """Strings, and counts such as `total_parameters`; what else there is has no use here."""
    return {
        key: value
        for key, value in metadata.items()
        if isinstance(value, str) or (type(value) is int and 0 <= value < MAX_COUNT)
        if key != "total_size"
    }


def encode_index(index: Index, total_size: int) -> bytes:
    """An index as huggingface_hub writes it, with the true `total_size` in bytes."""
    table: dict[str, Any] = {
        "metadata": {**index.metadata, "total_size": total_size},
        "weight_map": index.weight_map,
    }
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()
