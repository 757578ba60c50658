"""One flipped bit, a page of zeros, two swapped pages: found every time, and named.

`pytest -m slow tests/verification/test_bit_flips.py` flips every bit of the headers and of the
manifest, 50 000 random bits of the data, and puts 5 000 pages wrong.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from shardkit.errors import LayoutError, ManifestError, VerifyError
from shardkit.runtime.weights import read_tensors
from shardkit.shards.integrity import check_rank
from shardkit.shards.manifest import MANIFEST_NAME
from shardkit.shards.manifest_json import parse_manifest, read_manifest
from shardkit.shards.reader import open_shard
from shardkit.strict_json import JsonError
from shardkit.verification import check_files
from tests.helpers.damage import Split, quiet, written
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Files of a few pages: a hash costs little more than opening them."""
    base = tmp_path_factory.mktemp("small")
    source = write_source(base / "source", llama_config(), specs_of(llama()))
    return Split(base / "shards", split_folder(source, base / "shards", 2))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Files of many pages."""
    base = tmp_path_factory.mktemp("large")
    shapes = llama(head=16, ffn=256, vocab=320)
    source = write_source(base / "source", llama_config(ffn=256), specs_of(shapes))
    return Split(base / "shards", split_folder(source, base / "shards", 3))


def names_of(split: Split, tp_rank: int) -> set[str]:
    return set(split.manifest.ranks[tp_rank].pieces)


def check_data(split: Split, tp_rank: int, at: int, thorough: bool) -> None:
    """Verify names the damage that is in a rank's file from byte `at` on."""
    with pytest.raises((VerifyError, ManifestError)) as caught:
        check_rank(split.folder, split.manifest, split.manifest.mesh.rank(tp_rank), quiet)
    expected = f"{split.path(tp_rank)}: "
    assert expected in str(caught.value)
    assert split.named(tp_rank, at) in str(caught.value)
    if not thorough:
        return
    found = check_files(split.folder, quiet)
    assert (found.verdict, found.faults) == ("failed", (str(caught.value),))
    with pytest.raises((VerifyError, ManifestError)) as loading:
        for _ in read_tensors(
            split.folder,
            split.manifest,
            split.manifest.mesh.rank(tp_rank),
            names_of(split, tp_rank),
            True,
        ):
            pass
    assert str(loading.value) == str(caught.value)


def check_header_bits(split: Split, tp_rank: int, bits: Iterable[int]) -> None:
    for bit in bits:
        at, byte = split.flipped(tp_rank, bit)
        with written(split.path(tp_rank), at, byte), pytest.raises(ManifestError) as caught:
            os.close(open_shard(split.folder, split.manifest, split.manifest.mesh.rank(tp_rank)))
        assert str(split.path(tp_rank)) in str(caught.value)
        assert split.named(tp_rank, at) in str(caught.value)
        assert "\n" not in str(caught.value)


def check_manifest_bits(split: Split, bits: Iterable[int]) -> None:
    sound = (split.folder / MANIFEST_NAME).read_bytes()
    for bit in bits:
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((JsonError, LayoutError)):
            parse_manifest(bytes(damaged))


def check_data_bits(split: Split, count: int, seed: int) -> None:
    for turn, (tp_rank, bit) in enumerate(split.bits(count, seed)):
        at, byte = split.flipped(tp_rank, bit)
        with written(split.path(tp_rank), at, byte):
            check_data(split, tp_rank, at, turn % 20 == 0)


def check_pages(split: Split, count: int, seed: int) -> None:
    for turn, (tp_rank, at, data) in enumerate(split.pages(count, seed)):
        sound = split.sound[tp_rank]
        first = next(i for i, byte in enumerate(data) if byte != sound[at + i])
        with written(split.path(tp_rank), at, data):
            check_data(split, tp_rank, at + first, turn % 20 == 0)


def test_a_sound_split_passes_and_every_tensor_is_read(small: Split, large: Split) -> None:
    for split in (small, large):
        assert check_files(split.folder, quiet).verdict == "passed"
        for tp_rank in range(split.manifest.tp_size):
            names = names_of(split, tp_rank)
            found = read_tensors(
                split.folder, split.manifest, split.manifest.mesh.rank(tp_rank), names, True
            )
            assert {name for name, _ in found} == names


def test_a_flipped_bit_of_a_header_is_found_and_its_byte_named(small: Split) -> None:
    for tp_rank, length in enumerate(small.headers):
        check_header_bits(small, tp_rank, range(tp_rank, 8 * length, 23))


def test_a_flipped_bit_of_the_manifest_is_found(small: Split) -> None:
    size = (small.folder / MANIFEST_NAME).stat().st_size
    check_manifest_bits(small, range(3, 8 * size, 29))
    with written(small.folder / MANIFEST_NAME, 0, b"["), pytest.raises(ManifestError) as caught:
        read_manifest(small.folder)
    assert str(small.folder / MANIFEST_NAME) in str(caught.value)


def test_a_flipped_bit_of_the_data_is_found_and_its_tensor_named(small: Split) -> None:
    check_data_bits(small, 1500, seed=1)


def test_a_page_out_of_place_is_found_and_its_tensor_named(large: Split) -> None:
    check_pages(large, 300, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_bit_of_every_header_is_found(small: Split) -> None:
    for tp_rank, length in enumerate(small.headers):
        check_header_bits(small, tp_rank, range(8 * length))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_bit_of_the_manifest_is_found(small: Split) -> None:
    check_manifest_bits(small, range(8 * (small.folder / MANIFEST_NAME).stat().st_size))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_thousand_bits_of_the_data_are_found(small: Split) -> None:
    check_data_bits(small, 50_000, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_five_thousand_pages_out_of_place_are_found(large: Split) -> None:
    check_pages(large, 5_000, seed=4)


def test_damage_in_two_tensors_is_told_as_where_it_begins(small: Split) -> None:
    last = len(small.sound[0]) - 1
    first = small.headers[0]
    one, two = small.flipped(0, 8 * first), small.flipped(0, 8 * last)
    with written(small.path(0), *one), written(small.path(0), *two):
        check_data(small, 0, first, thorough=True)
        (fault,) = check_files(small.folder, quiet).faults
    held = len(small.manifest.ranks[0].pieces)
    assert f"the 0 tensors before it are intact, the {held - 1} after it were not checked" in fault


def test_damage_is_found_in_every_file_that_has_it(large: Split) -> None:
    flips = [large.flipped(rank, 8 * large.headers[rank]) for rank in (0, 2)]
    with written(large.path(0), *flips[0]), written(large.path(2), *flips[1]):
        faults = check_files(large.folder, quiet).faults
    assert [Path(fault.split(": ")[0]) for fault in faults] == [large.path(0), large.path(2)]
