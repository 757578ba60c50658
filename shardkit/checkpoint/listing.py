"""What a folder's names and small files say before any weights are opened.

A Hub repository is judged by the same rules from its list of names, before its weights are fetched.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shardkit import strict_json
from shardkit.checkpoint.index import SUFFIX, Index, read_index
from shardkit.errors import CheckpointError
from shardkit.files import is_plain_name, read_small, real_file

SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
MANIFEST = "manifest.json"
MAX_CONFIG = 4 << 20  # the longest known name 21 000 labels twice, in 2 MB


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted.  Raises CheckpointError."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as failure:
        raise CheckpointError(f"{folder}: {failure.strerror}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.  Raises CheckpointError."""
    path = real_file(folder, "config.json", CheckpointError)
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json; name the folder of a Hugging Face model")
    try:
        config = strict_json.parse(read_small(path, MAX_CONFIG, CheckpointError))
    except strict_json.JsonError as fault:
        raise CheckpointError(f"{folder}/config.json: {fault}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/config.json: is no JSON object")
    return config


def is_companion(name: str) -> bool:
    """Whether a model needs this small file beside its weights: never code, nor an index."""
    return (
        name.endswith(COMPANIONS)
        and not name.endswith(".index.json")
        and name != MANIFEST  # a shard folder has its own
        and is_plain_name(name)
    )


def weight_files(folder: Path, names: Sequence[str]) -> tuple[Index | None, list[str]]:
    """The index, if there is one, and the weights files.  Raises CheckpointError if in doubt.

    `names` are what the folder holds, or will hold; only an index is read.
    """
    indices = _own(name for name in names if name.endswith(SUFFIX))
    weights = _own(name for name in names if name.endswith(".safetensors"))
    if MANIFEST in names and any(name.startswith("rank-") for name in weights):
        raise CheckpointError(
            f"{folder}: a shard folder, no checkpoint; use `shardkit merge` or `shardkit reshard`"
        )
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder}: {len(indices)} indices, {' and '.join(map(strict_json.shown, indices))};"
            " keep one"
        )
    if indices:
        return _indexed(folder, indices[0], names)
    if SINGLE in weights or len(weights) == 1:
        return None, [SINGLE if SINGLE in weights else weights[0]]
    if weights:
        raise CheckpointError(
            f"{folder}: {len(weights)} safetensors files, and no *{SUFFIX} that says which belong"
            f" to the model; fetch the index, or leave only {SINGLE}"
        )
    if any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(
            f"{folder}: only pickled weights, which can run code; convert them to safetensors first"
        )
    raise CheckpointError(f"{folder}: no safetensors file; name the folder that holds the weights")


def _indexed(folder: Path, name: str, names: Sequence[str]) -> tuple[Index, list[str]]:
    index = read_index(folder, name)
    files = sorted(set(index.weight_map.values()))
    present = set(names)
    if SINGLE in present and SINGLE not in files:
        raise CheckpointError(
            f"{folder}: has both {SINGLE} and {name}, which does not name it; remove one"
        )
    if missing := [file for file in files if file not in present]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder / missing[0]}: missing, though {name} names it{more}; fetch it again"
        )
    return index, files


def _own(names: Iterable[str]) -> list[str]:
    """Without Mistral's own form of the same weights, where the Hugging Face form is there too."""
    found = list(names)
    return [name for name in found if not name.startswith("consolidated")] or found
