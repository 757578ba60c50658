"""A small split's manifest, as it is and changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardkit import strict_json
from shardkit.errors import ManifestError
from shardkit.shards.manifest import MANIFEST_NAME
from shardkit.shards.manifest_json import read_manifest
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

K_PROJ = "model.layers.0.self_attn.k_proj.weight"

NORM = "model.norm.weight"

O_PROJ = "model.layers.0.self_attn.o_proj.weight"

SHA = "0" * 64


Table = Any


def tiny(folder: Path) -> Path:
    """Twelve query heads on two kv heads, so that four ranks replicate; two files with an index."""
    shapes = llama(heads=12, kv=2, head=2, ffn=7, vocab=11)
    config = {**llama_config(12, 2, 7), "tie_word_embeddings": False}
    return write_source(
        folder, config, specs_of(shapes), lambda at: f"model-{at % 2 + 1:05d}-of-00002.safetensors"
    )


def written(table: Table) -> bytes:
    return strict_json.encode_canonical(table) + b"\n"


def changed(*path: Any, to: Any) -> Callable[[Table], None]:
    """Set one value of the table."""

    def change(table: Table) -> None:
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = to

    return change


def without(*path: Any) -> Callable[[Table], None]:
    """Take one value of the table away."""

    def change(table: Table) -> None:
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return change


def fault_of(data: bytes, tmp_path: Path) -> str:
    """What the reader says of a manifest, in one line."""
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / MANIFEST_NAME}: ")
    assert text.isprintable(), text
    assert len(text) < 600
    return text
