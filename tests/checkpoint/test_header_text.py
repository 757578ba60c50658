"""The usual spelling of a header is read as the same JSON would be, or not at all."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardkit import strict_json
from shardkit.checkpoint import header
from shardkit.checkpoint.header import Header, encode_header, parse_header
from shardkit.checkpoint.header_text import scan_header
from shardkit.errors import LayoutError
from shardkit.strict_json import JsonError
from shardkit.tensor import TensorSpec
from tests.helpers.header_cases import BAD, GOOD

SPECS = [TensorSpec("a.0.w", "BF16", (2, 3)), TensorSpec("a.1.w", "F8_E4M3", (7,))]


def read_raw(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def read(raw: bytes, size: int) -> Header | str:
    try:
        return parse_header(raw, size)
    except (JsonError, LayoutError) as fault:
        return str(fault)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_what_the_library_and_we_write_is_read_without_json(
    metadata: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": torch.ones(2, 3), "n": torch.tensor(1), "none": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata or None)
    data = (tmp_path / "x.safetensors").read_bytes()
    own = encode_header(SPECS, metadata)
    monkeypatch.delattr(strict_json, "parse_json")
    assert set(parse_header(read_raw(data), len(data)).names) == tensors.keys()
    read_again = parse_header(own[8:], len(own) + sum(spec.nbytes for spec in SPECS))
    assert [entry.spec for entry in read_again.entries] == SPECS
    assert read_again.metadata == metadata


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_it_says_what_json_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = GOOD[name] if name in GOOD else BAD[name][0]
    raw = read_raw(data) if len(data) >= 8 else b""
    result = read(raw, len(data))
    monkeypatch.setattr(header, "scan_header", lambda _: None)
    assert result == read(raw, len(data))


def test_a_changed_byte_is_never_read_as_anything_but_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes of a header are replaced, left out and doubled; sometimes it is still a header."""
    whole = encode_header(SPECS, {"format": "pt"})[8:].rstrip()
    size, choices = 8 + len(whole) + sum(spec.nbytes for spec in SPECS), random.Random(7)
    changed = []
    for _ in range(3000):
        at, byte = choices.randrange(len(whole)), choices.choice(b'{}[]",:0123456789.-eE\\ taF')
        cut = choices.randrange(2)
        changed.append(whole[:at] + bytes([byte]) + whole[at + cut :])
    results = [read(raw, size) for raw in changed]
    scanned = [raw for raw in changed if scan_header(raw) is not None]
    assert 30 < len(scanned) < 2900
    for raw in scanned:
        assert isinstance(json.loads(raw), dict)
    monkeypatch.setattr(header, "scan_header", lambda _: None)
    assert results == [read(raw, size) for raw in changed]
