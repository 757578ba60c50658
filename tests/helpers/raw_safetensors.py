"""Sources made by hand, byte by byte, so that they can be wrong in one chosen way."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama"}


def file_bytes(header: str | bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file: the length, the header as it is given, the data."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    """A header's entry for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def small_file(*names: str) -> bytes:
    """A sound file of F32[2] tensors; each holds bytes of its own."""
    table = {name: entry("F32", [2], 8 * i, 8 * i + 8) for i, name in enumerate(names)}
    return file_bytes(table, b"".join(name.encode().ljust(8, b".")[:8] for name in names))


def write_folder(folder: Path, files: Mapping[str, bytes | str | Mapping[str, Any]]) -> Path:
    """A checkpoint folder: a config.json unless one is given, and `files`, tables as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": CONFIG, **files}.items():
        if isinstance(content, Mapping):
            content = json.dumps(content)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def index_of(weight_map: Mapping[str, Any], **metadata: Any) -> dict[str, Any]:
    """An index file's table."""
    return {"metadata": metadata, "weight_map": dict(weight_map)}


def check_error(error: BaseException, *words: str) -> None:
    """Assert that an error is one printable line that holds every one of the words."""
    text = str(error)
    assert text.isprintable(), f"not one printable line: {text!r}"
    assert len(text) < 1000
    for word in words:
        assert word in text
