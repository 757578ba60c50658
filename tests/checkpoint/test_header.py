"""The safetensors header: what is refused, and that the library is never stricter than we are."""

import random
from pathlib import Path

import pytest
import safetensors

from shardkit.checkpoint.header import (
    encode_header,
    parse_header,
    read_header,
)
from shardkit.errors import CheckpointError, LayoutError, ManifestError
from shardkit.strict_json import JsonError
from shardkit.tensor import TensorSpec
from tests.helpers.header_cases import BAD, GOOD, SOUND
from tests.helpers.raw_safetensors import check_error, entry, file_bytes
from tests.helpers.real_inputs import shared

# What the library accepts and we do not, each on purpose.
STRICTER = {
    "leading space",
    "duplicate tensor, same bytes",
    "duplicate tensor, empty first",
    "duplicate key inside metadata",
    "metadata null",
    "entry with an unknown key",
    "entry a list",
    "shape of 65 dimensions",
    "an index beyond the largest dimension",
    "an empty name",
    "a name with a line break",
    "a name with an escape code",
    "a name with a NUL",
    "a name that turns the text around",
    "a name of 100 kB",
}


def _library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library reads, or None where it refuses."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in found}


def _ours(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = read_header(path)
    except CheckpointError:
        return None
    data = path.read_bytes()
    return {
        e.spec.name: (e.spec.dtype, e.spec.shape, data[e.start : e.stop]) for e in found.entries
    }


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_file_and_fault(
    case: str, tmp_path: Path
) -> None:
    data, words = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    check_error(caught.value, str(path), *words)


@pytest.mark.parametrize("case", [*BAD, *GOOD])
def test_the_library_rejects_nothing_that_is_accepted_here(case: str, tmp_path: Path) -> None:
    data = GOOD[case] if case in GOOD else BAD[case][0]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    ours, theirs = _ours(path), _library(data)
    assert (ours is not None) == (case in GOOD)
    assert (theirs is not None) == (case in GOOD or case in STRICTER)
    if ours is not None:
        assert ours == theirs


def test_no_mutated_header_is_accepted_that_the_library_rejects() -> None:
    base = file_bytes(
        {
            "__metadata__": {"format": "pt"},
            "a": entry("BF16", [2, 2], 0, 8),
            "b.c": entry("F32", [0], 8, 8),
            "d": entry("U8", [8], 8, 16),
        }
    )[8:]
    rng = random.Random(1)
    data = bytes(range(16))
    accepted = rejected = 0
    for _ in range(4000):
        raw = bytearray(base)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(1, len(raw))
            piece = rng.choice(
                [b"", bytes([rng.randrange(128)]), base[at - 1 : at + 1], b"-0", b"1"]
            )
            raw[at : at + rng.randint(0, 2)] = piece
        try:
            found = parse_header(bytes(raw), 8 + len(raw) + len(data))
        except (JsonError, LayoutError):
            rejected += 1
            continue
        accepted += 1
        theirs = _library(file_bytes(bytes(raw), data))
        assert theirs is not None, bytes(raw)
        ours = {e.spec.name: (e.spec.dtype, e.spec.shape) for e in found.entries}
        assert ours == {name: (dtype, shape) for name, (dtype, shape, _) in theirs.items()}
    assert accepted > 100
    assert rejected > 100


def test_entries_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD["entries out of the order of their bytes"])
    assert [e.spec.name for e in read_header(path).entries] == ["a", "z"]


def test_a_caller_chooses_the_error(tmp_path: Path) -> None:
    path = tmp_path / "rank.safetensors"
    path.write_bytes(SOUND[:-1])
    with pytest.raises(ManifestError, match="truncated"):
        read_header(path, ManifestError)


def test_a_written_header_is_read_back_by_the_library() -> None:
    specs = [
        TensorSpec("z", "BF16", (2, 3)),
        TensorSpec("a", "F8_E4M3", (5,)),
        TensorSpec("härte", "F32", ()),
    ]
    head = encode_header(specs, {"format": "pt", "note": 'a "quoted"\nword'})
    data = bytes(range(12 + 5 + 4))
    assert len(head) % 8 == 0
    theirs = _library(head + data)
    assert theirs is not None
    assert {n: (d, s) for n, (d, s, _) in theirs.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in specs
    }
    assert theirs["a"][2] == data[12:17]
    again = parse_header(head[8:], len(head + data))
    assert [e.spec for e in again.entries] == specs
    assert again.metadata == {"format": "pt", "note": 'a "quoted"\nword'}


def test_a_real_file_of_bloom_reads() -> None:
    path = shared("fixtures/bloom-176b/model_00072-of-00072.safetensors")
    ours = _ours(path)
    assert ours
    assert ours == _library(path.read_bytes())


def test_a_real_lfs_pointer_is_named_as_one() -> None:
    path = shared("fixtures/bloom-176b/model_00072.lfs-pointer.txt")
    with pytest.raises(CheckpointError, match=r"LFS pointer.*git lfs pull"):
        read_header(path)
