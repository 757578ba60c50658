"""What a folder's names and small files say before any weights are opened.

A Hub repository is judged by the same rules from its list of names, before its weights are fetched.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from shardkit import strict_json
from shardkit.checkpoint.index import SUFFIX, WEIGHTS, Index, read_index
from shardkit.errors import CheckpointError
from shardkit.files import is_plain_name

SINGLE, USUAL_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ".bin"
PICKLED_STEM = "pytorch_model"
PICKLED_SINGLE, PICKLED_INDEX = f"{PICKLED_STEM}{PICKLED}", f"{PICKLED}.index.json"
PICKLES = (PICKLED, ".pt", ".pth", ".ckpt")
COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
MANIFEST_NAME = "manifest.json"  # shard folders have their own, so none is a companion
NUMBERED = re.compile(r"(?P<stem>.*?)[-_](?P<at>\d+)-of-(?P<count>\d+)\.\w+")
MAX_NUMBER = 9  # digits
_WAY_OUT = " convert them to safetensors first, or pass --allow-pickle"


def list_names(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises CheckpointError."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as failure:
        raise CheckpointError(f"{folder}: {failure.strerror}") from None


def is_companion(name: str) -> bool:
    """Whether a model needs this small file beside its weights: never code, nor an index."""
    return (
        name.endswith(COMPANIONS)
        and not name.endswith(".index.json")
        and name != MANIFEST_NAME
        and is_plain_name(name)
    )


def find_weight_files(
    folder: Path, names: Sequence[str], pickled: bool = False
) -> tuple[Index | None, list[str]]:
    """The index, if there is one, and the weights files. Raises CheckpointError if in doubt.

    An index is of another build if the files that are there are a whole set without it: then they
    are named, and the index is as it was read. If a whole set has none, the index is an empty one.

    Args:
        folder: Where they are; only an index is read.
        names: What the folder holds, or will hold.
        pickled: Whether to name pickled files if there are no others.
    """
    indices = _prefer_hugging_face_files(name for name in names if name.endswith(SUFFIX))
    weights = _prefer_hugging_face_files(name for name in names if name.endswith(WEIGHTS))
    if MANIFEST_NAME in names and any(name.startswith("rank-") for name in weights):
        raise CheckpointError(
            f"{folder}: a shard folder, not a checkpoint; use `shardkit merge` or"
            " `shardkit reshard`"
        )
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder}: {len(indices)} indices, {' and '.join(map(strict_json.quote, indices))};"
            " keep one"
        )
    if indices:
        return _find_indexed_files(folder, indices[0], names, weights)
    if SINGLE in weights or len(weights) == 1:
        return None, [SINGLE if SINGLE in weights else weights[0]]
    if is_whole_set(weights):
        return Index(USUAL_INDEX, {}), weights
    if weights:
        raise CheckpointError(
            f"{folder}: {len(weights)} safetensors files, and no *{SUFFIX} that says which belong"
            f" to the model; fetch the index, or leave only {SINGLE}, or all of one set"
            " 1-of-n to n-of-n"
        )
    return _find_pickled_files(folder, names, pickled)


def is_whole_set(names: Sequence[str]) -> bool:
    """Whether files are the n of one set, numbered 1-of-n to n-of-n, or from 0, and no others."""
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    if not matches or len(matches) < len(names):
        return False
    sets = {(match["stem"], match["count"]) for match in matches}
    if len(sets) > 1 or max(len(match["count"]) for match in matches) > MAX_NUMBER:
        return False
    numbers, count = sorted(int(match["at"]) for match in matches), int(matches[0]["count"])
    return len(numbers) == count and numbers in (
        list(range(1, count + 1)),
        list(range(count)),
    )


def _find_pickled_files(
    folder: Path, names: Sequence[str], pickled: bool
) -> tuple[Index | None, list[str]]:
    """As `find_weight_files`, in a folder without safetensors."""
    if pickled and PICKLED_SINGLE in names:
        return None, [PICKLED_SINGLE]
    pickles = [n for n in names if n.startswith(PICKLED_STEM) and n.endswith(PICKLED)]
    if pickled and (pickled_indices := [name for name in names if name.endswith(PICKLED_INDEX)]):
        return _find_indexed_files(folder, pickled_indices[0], names, pickles, PICKLED)
    if pickled and is_whole_set(pickles):
        return Index(f"{PICKLED_SINGLE}.index.json", {}), pickles
    if any(name.endswith(PICKLES) for name in names):
        read = f" there is neither {PICKLED_SINGLE} nor *{PICKLED_INDEX}" if pickled else ""
        raise CheckpointError(
            f"{folder}: only pickled weights, which can run code;{read or _WAY_OUT}"
        )
    raise CheckpointError(f"{folder}: no safetensors file; name the folder that holds the weights")


def _find_indexed_files(
    folder: Path, name: str, names: Sequence[str], weights: Sequence[str], suffix: str = WEIGHTS
) -> tuple[Index | None, list[str]]:
    """The files that an index names; or all the weights there are, a whole set without it."""
    index = read_index(folder, name, suffix)
    files = sorted(set(index.weight_map.values()))
    missing = [file for file in files if file not in names]
    if missing and (list(weights) == [SINGLE] or is_whole_set(weights)):
        return index, sorted(weights)
    if SINGLE in names and SINGLE not in files:
        raise CheckpointError(
            f"{folder}: has both {SINGLE} and {name}, which does not name it; remove one"
        )
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder / missing[0]}: missing, though {name} names it{more}; fetch it again, or"
            f" leave all of one set 1-of-n to n-of-n and no other *{suffix}"
        )
    return index, files


def _prefer_hugging_face_files(names: Iterable[str]) -> list[str]:
    """Without Mistral's own form of the same weights, if the Hugging Face form is there too."""
    every = list(names)
    return [name for name in every if not name.startswith("consolidated")] or every
