"""Folders that are no checkpoint, or would lead astray: refused in one line that says why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint import open_checkpoint
from shardkit.errors import CheckpointError
from tests.helpers.checkpoint_contents import ONE, PAIR, PAIR_MAP, SINGLE, TWO, count_open_files
from tests.helpers.raw_safetensors import (
    INDEX,
    check_error,
    index_of,
    small_file,
    write_folder,
)
from tests.helpers.real_inputs import shared

# Files of a folder that is no checkpoint, and words its error must hold.
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ("no safetensors file",)),
    "only pickles": (
        {"pytorch_model.bin": b"x", "pytorch_model.bin.index.json": {}},
        ("only pickled weights", "convert", "safetensors"),
    ),
    "several files and no index": (
        {"a.safetensors": PAIR[ONE], "b.safetensors": PAIR[TWO]},
        ("2 safetensors files", "no *", "fetch the index", "1-of-n to n-of-n"),
    ),
    "two indices": (
        PAIR | {INDEX: index_of(PAIR_MAP), "other.safetensors.index.json": index_of(PAIR_MAP)},
        ("2 indices", INDEX, "other.safetensors.index.json", "keep one"),
    ),
    "both a single file and an index": (
        PAIR | {INDEX: index_of(PAIR_MAP), SINGLE: small_file("a")},
        ("both", SINGLE, INDEX, "remove one"),
    ),
    "a file missing": (
        {ONE: PAIR[ONE], INDEX: index_of(PAIR_MAP)}, (TWO, "missing", INDEX, "fetch"),
    ),
    "every file missing": ({INDEX: index_of(PAIR_MAP)}, (ONE, "missing", "1 more")),
    "a tensor in two files": (
        {ONE: small_file("a", "b"), TWO: small_file("b"), INDEX: index_of({"a": ONE, "b": TWO})},
        (TWO, "'b'", ONE, "as well"),
    ),
    "a tensor the index does not name": (
        {"x.safetensors": PAIR[ONE], INDEX: index_of({"a": "x.safetensors"})},
        (INDEX, "does not name 'b'", "x.safetensors"),
    ),
    "a tensor that no file has": (
        PAIR | {INDEX: index_of(PAIR_MAP | {"d": ONE})}, (INDEX, "'d'", ONE, "no file"),
    ),
    "a tensor in another file than the index says": (
        {
            "x.safetensors": PAIR[ONE], "y.safetensors": PAIR[TWO],
            INDEX: index_of({"a": "y.safetensors", "b": "x.safetensors", "c": "y.safetensors"}),
        },
        (INDEX, "'a'", "y.safetensors", "x.safetensors"),
    ),
    "an unprintable name in the index": (
        PAIR | {INDEX: index_of(PAIR_MAP | {"d\n": ONE})}, (r"'d\n'",),
    ),
    "an index of pickles under the name of a safetensors index": (
        PAIR | {INDEX: index_of({"a": "pytorch_model-00001.bin"})}, ("convert",),
    ),
    "a file cut short": (
        PAIR | {TWO: PAIR[TWO][:-1], INDEX: index_of(PAIR_MAP)}, (TWO, "truncated"),
    ),
    "a shard folder": (
        {"manifest.json": {}, "rank-00000-of-00001.safetensors": small_file("a")},
        ("shard folder", "merge", "reshard"),
    ),
    "no config": ({SINGLE: small_file("a"), "config.json": None}, ("no config.json",)),
    "config empty": ({SINGLE: small_file("a"), "config.json": b""}, ("config.json", "damaged")),
    "config no JSON": (
        {SINGLE: small_file("a"), "config.json": "model_type: llama"}, ("config.json", "damaged"),
    ),
    "config a list": ({SINGLE: small_file("a"), "config.json": "[]"}, ("config.json", "object")),
    "config with a key twice": (
        {SINGLE: small_file("a"), "config.json": '{"a":1,"model_type":"x","a":2}'},
        ("config.json", "duplicate key 'a'"),
    ),
    "config with a key twice inside": (
        {SINGLE: small_file("a"), "config.json": '{"model_type":"x","r":{"k":1,"k":1}}'},
        ("config.json", "duplicate key 'k'"),
    ),
    "config with NaN": (
        {SINGLE: small_file("a"), "config.json": '{"rms_norm_eps":NaN}'}, ("config.json", "NaN"),
    ),
    "config with a number too large": (
        {SINGLE: small_file("a"), "config.json": '{"rope_theta":1e999}'}, ("config.json", "1e999"),
    ),
    "config not UTF-8": (
        {SINGLE: small_file("a"), "config.json": b'{"a":"\xff"}'}, ("config.json", "UTF-8"),
    ),
    "config nested beyond measure": (
        {SINGLE: small_file("a"), "config.json": "[" * 100_000}, ("config.json", "nested"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_checkpoint_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    files, words = BAD[case]
    write_folder(tmp_path, {name: data for name, data in files.items() if data is not None})
    for name in [name for name, data in files.items() if data is None]:
        (tmp_path / name).unlink()
    before = count_open_files()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    check_error(caught.value, str(tmp_path), *words)
    assert count_open_files() == before


def _outside(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(small_file("a"))
    (folder / SINGLE).symlink_to(folder.parent / "outside.safetensors")


def _outside_config(folder: Path) -> None:
    (folder / SINGLE).write_bytes(small_file("a"))
    (folder / "config.json").replace(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def _outside_index(folder: Path) -> None:
    (folder / ONE).write_bytes(small_file("a"))
    (folder.parent / INDEX).write_text(json.dumps(index_of({"a": ONE})))
    (folder / INDEX).symlink_to(folder.parent / INDEX)


def _two_steps_outside(folder: Path) -> None:
    _outside(folder)
    (folder / SINGLE).rename(folder / "step")
    (folder / SINGLE).symlink_to("step")


def _loop(folder: Path) -> None:
    (folder / SINGLE).symlink_to(SINGLE)


def _dangling(folder: Path) -> None:
    (folder / SINGLE).symlink_to("absent")


def _fifo_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


# What a folder is made to hold, and words its error must hold.
TRAPS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a link out of the folder": (_outside, ("links to", "outside")),
    "a link to a link out of the folder": (_two_steps_outside, ("links to", "outside")),
    "a config linked from outside": (_outside_config, ("config.json", "links to", "outside")),
    "an index linked from outside": (_outside_index, (INDEX, "links to", "outside")),
    "a loop of links": (_loop, (SINGLE,)),
    "a link to nothing": (_dangling, (SINGLE, "a link to a file that is not there")),
    "a FIFO": (lambda folder: os.mkfifo(folder / SINGLE), (SINGLE, "not a regular file")),
    "a FIFO as config": (_fifo_config, ("config.json", "not a regular file")),
    "a folder named as a file": (
        lambda folder: (folder / SINGLE).mkdir(), (SINGLE, "not a regular file"),
    ),
    "a device": (
        lambda folder: (folder / SINGLE).symlink_to("/dev/zero"), ("links to /dev/zero",),
    ),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", TRAPS)
def test_a_folder_that_would_lead_astray_is_refused(case: str, tmp_path: Path) -> None:
    lay, words = TRAPS[case]
    folder = write_folder(tmp_path / "model", {})
    lay(folder)
    before = count_open_files()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    check_error(caught.value, *words)
    assert count_open_files() == before


def test_a_file_is_no_source_and_its_folder_is_named_as_the_way_out(tmp_path: Path) -> None:
    write_folder(tmp_path, {SINGLE: small_file("a")})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path / SINGLE))
    check_error(caught.value, SINGLE, "folder")


@pytest.mark.parametrize(
    "source", ["", "./absent", "/absent/model", "a/b/c", "org/", "a\0b", "a\nb", "x" * 5000, "~/m"],
    ids=lambda source: repr(source[:12]),
)  # fmt: skip
def test_a_source_that_is_neither_a_folder_nor_a_hub_id_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    check_error(caught.value, "no such folder", "org/name")


def test_a_real_lfs_pointer_in_place_of_the_weights_is_named_as_one(tmp_path: Path) -> None:
    pointer = shared("fixtures/bloom-176b/model_00072.lfs-pointer.txt")
    folder = write_folder(tmp_path, {SINGLE: pointer.read_bytes()})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    check_error(caught.value, SINGLE, "LFS pointer", "git lfs pull")


def test_a_real_index_without_its_weights_names_the_first_missing_file(tmp_path: Path) -> None:
    folder = shared("fixtures/llama-3.1-70b-reflection")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    check_error(caught.value, "missing", "161 more")


def test_a_file_that_a_cache_has_lost_is_called_by_the_name_that_users_know(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = write_folder(repo / "snapshots" / ("0" * 40), {})
    (snapshot / SINGLE).symlink_to("../../blobs/f00d")
    (repo / "blobs").mkdir()
    for data in (None, b"damaged"):
        if data is not None:
            (repo / "blobs" / "f00d").write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(snapshot))
        assert str(caught.value).startswith(f"{snapshot / SINGLE}: ")
        assert "f00d" not in str(caught.value)
