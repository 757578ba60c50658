"""Weights files that are a whole set by their names need no index, and none of another build."""

import json
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint import open_checkpoint
from shardkit.checkpoint.weight_files import is_whole_set
from shardkit.errors import CheckpointError
from tests.helpers.checkpoint_contents import ONE, PAIR, PAIR_MAP, SINGLE, TWO
from tests.helpers.command_line import run
from tests.helpers.fixture_checkpoints import small_checkpoint
from tests.helpers.raw_safetensors import INDEX, check_error, index_of, small_file, write_folder

OTHER = "model-00003-of-00030.safetensors"
OLD = {name: OTHER for name in PAIR_MAP}
# Files of a folder whose index is not true, and the files that are taken.
TAKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no index": (PAIR, [ONE, TWO]),
    "an index of other files": (PAIR | {INDEX: index_of(OLD)}, [ONE, TWO]),
    "an index of the same files, otherwise filled": (
        PAIR | {INDEX: index_of(PAIR_MAP | {"a": TWO})}, [ONE, TWO],
    ),
    "an index that lacks a tensor": (
        PAIR | {INDEX: index_of({"c": TWO, "a": ONE})}, [ONE, TWO],
    ),
    "a single file beside an index of files that are gone": (
        {SINGLE: small_file("a", "b", "c"), INDEX: index_of(OLD)}, [SINGLE],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_a_whole_set_is_taken_with_a_warning(case: str, tmp_path: Path) -> None:
    files, expected = TAKEN[case]
    with open_checkpoint(str(write_folder(tmp_path, files))) as checkpoint:
        assert [file.name for file in checkpoint.files] == expected
        (warning,) = checkpoint.warnings
    assert "whole set" in warning
    assert INDEX in warning


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({ONE: PAIR[ONE], INDEX: index_of(OLD)}, (OTHER, "missing", "fetch it again", "1-of-n")),
        (
            PAIR | {INDEX: index_of(OLD), "extra.safetensors": small_file("x")},
            (OTHER, "missing", "leave all of one set"),
        ),
        (
            {ONE: small_file("a"), TWO: small_file("a"), INDEX: index_of({"a": OTHER})},
            ("'a'", "as well"),
        ),
        (PAIR | {INDEX: index_of(PAIR_MAP | {"d": ONE})}, ("'d'", "no file", "delete the index")),
    ],
    ids=["half a set", "another file", "a tensor twice", "a tensor that no file has"],
)
def test_what_is_no_whole_set_is_refused(
    files: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    check_error(caught.value, str(folder), *words)


def test_the_way_out_of_an_older_index_works(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, PAIR | {INDEX: index_of(PAIR_MAP | {"d": ONE})})
    (folder / INDEX).unlink()
    with open_checkpoint(str(folder)) as checkpoint:
        assert {spec.name for spec in checkpoint.specs()} == set(PAIR_MAP)


@pytest.mark.parametrize(
    "names",
    [
        [], ["model.safetensors"], [ONE], [ONE, TWO, SINGLE], [ONE, OTHER], [ONE, ONE],
        [ONE, "other-00002-of-00002.safetensors"], ["model-1-of-99999999999.safetensors"],
        [f"a-{at}-of-3.safetensors" for at in (0, 1, 3)],
    ],
    ids=str,
)  # fmt: skip
def test_files_that_are_not_each_of_n_are_no_set(names: list[str]) -> None:
    assert not is_whole_set(names)


@pytest.mark.parametrize("first", [0, 1])
def test_files_numbered_from_zero_or_one_are_a_set(first: int) -> None:
    assert is_whole_set([f"model_{at}-of-3.safetensors" for at in range(first, first + 3)])


@pytest.mark.parametrize("index", ["gone", "old"])
def test_a_split_without_a_true_index_merges_to_a_checkpoint_with_one(
    index: str, tmp_path: Path
) -> None:
    source = small_checkpoint(tmp_path / "source")
    true = json.loads((source / INDEX).read_text())["weight_map"]
    (source / INDEX).unlink()
    if index == "old":
        (source / INDEX).write_text(json.dumps(index_of(dict.fromkeys(true, OTHER))))
    planned = run("plan", source, "--tp", "2")
    assert planned.stderr.startswith("Warning: ")
    split = run("split", source, tmp_path / "shards", "--tp", "2")
    assert split.exit_code == 0, split.stderr
    assert "whole set" in split.stderr
    assert run("merge", tmp_path / "shards", tmp_path / "again").exit_code == 0
    merged = json.loads((tmp_path / "again" / INDEX).read_text())
    assert merged["weight_map"] == true
    for name in sorted(set(true.values())):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
