"""The index: what is refused, what real ones get away with, and that a written one reads back."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint.index import Index, encode_index, read_index
from shardkit.errors import CheckpointError
from tests.helpers.raw_safetensors import INDEX, check_error, index_of, write_folder
from tests.helpers.real_inputs import shared

FILE = "model-00001-of-00001.safetensors"

# An index, and words its error must hold.
BAD: dict[str, tuple[str | bytes | dict[str, Any], tuple[str, ...]]] = {
    "empty": ("", ("damaged index",)),
    "cut short": (json.dumps(index_of({"a": FILE}))[:-3], ("damaged index", "truncated")),
    "a merge conflict": (
        '<<<<<<< HEAD\n{"weight_map":{}}\n=======\n>>>>>>> theirs\n', ("damaged index",),
    ),
    "not UTF-8": (b'{"weight_map":{"\xe4":"x"}}', ("damaged index", "UTF-8")),
    "a git-lfs pointer": ("version https://git-lfs.github.com/spec/v1\n", ("damaged index",)),
    "a list": ("[]", ("no weight_map",)),
    "no map": ({"metadata": {}}, ("no weight_map",)),
    "map of nothing": (index_of({}), ("no weight_map",)),
    "map a list": ({"weight_map": [FILE]}, ("no weight_map",)),
    "nested map": (index_of({"a": {"b": FILE}}), ("'a'", "not the name of a file")),
    "file a number": (index_of({"a": 3}), ("'a'", "3")),
    "file null": (index_of({"a": None}), ("'a'", "None")),
    "file a list": (index_of({"a": [FILE]}), ("'a'", FILE)),
    "file empty": (index_of({"a": ""}), ("'a'", "''")),
    "file above": (index_of({"a": "../x.safetensors"}), ("'a'", "'../x.safetensors'")),
    "file above, Windows": (index_of({"a": "..\\x.safetensors"}), ("'a'", "x.safetensors")),
    "file absolute": (index_of({"a": "/etc/x.safetensors"}), ("'a'", "'/etc/x.safetensors'")),
    "file below": (index_of({"a": "sub/x.safetensors"}), ("'a'", "'sub/x.safetensors'")),
    "file with a NUL": (index_of({"a": "x\0.safetensors"}), ("'a'", r"x\x00")),
    "file with a line break": (index_of({"a": "x\n.safetensors"}), ("'a'", r"x\n")),
    "file name of 5000 bytes": (
        index_of({"a": "x" * 5000 + ".safetensors"}), ("'a'", "not the name of a file"),
    ),
    "tensor with a line break": (index_of({"a\nb": "x.bin"}), (r"'a\nb'", "x.bin")),
    "tensor name of 5000 bytes": (index_of({"a" * 5000: "x.bin"}), ("x.bin",)),
    "pickled files": (
        index_of({"a": "pytorch_model-00001-of-00002.bin"}),
        ("'a'", "pytorch_model-00001-of-00002.bin", "convert", "safetensors"),
    ),
    "two places for a tensor": (
        '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', ("duplicate key 'a'",),
    ),
    "two maps": ('{"weight_map":{"a":"x.safetensors"},"weight_map":{}}', ("duplicate key",)),
    "total_size NaN": (
        '{"metadata":{"total_size":NaN},"weight_map":{"a":"x.safetensors"}}', ("NaN",),
    ),
    "total_size of 5000 digits": (
        '{"metadata":{"total_size":' + "9" * 5000 + '},"weight_map":{"a":"x.safetensors"}}',
        ("4300 digits",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_index_is_refused_in_one_line_that_names_file_and_fault(
    case: str, tmp_path: Path
) -> None:
    content, words = BAD[case]
    write_folder(tmp_path, {INDEX: content})
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path, INDEX)
    check_error(caught.value, str(tmp_path / INDEX), *words)


@pytest.mark.parametrize("total_size", [0, 8, 13731385408.0, 1e3, -1, "8", None, 10**30], ids=str)
def test_total_size_is_never_trusted(total_size: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, {INDEX: index_of({"a": FILE}, total_size=total_size)})
    assert read_index(tmp_path, INDEX).weight_map == {"a": FILE}


def test_an_index_without_metadata_reads(tmp_path: Path) -> None:
    write_folder(tmp_path, {INDEX: {"weight_map": {"a": FILE}}})
    assert read_index(tmp_path, INDEX) == Index(INDEX, {"a": FILE})


def test_the_order_of_an_index_is_kept_as_it_is(tmp_path: Path) -> None:
    unsorted = {"model.layers.10.x": FILE, "lm_head.weight": FILE, "model.layers.2.x": FILE}
    write_folder(tmp_path, {INDEX: index_of(unsorted)})
    assert list(read_index(tmp_path, INDEX).weight_map) == list(unsorted)


def test_a_fifo_in_place_of_an_index_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path, INDEX)
    check_error(caught.value, INDEX, "not a regular file")


def test_a_written_index_reads_back_with_its_strings_and_the_true_size(tmp_path: Path) -> None:
    index = Index(INDEX, {"b": FILE, "a": "other.safetensors"}, {"format": "pt"})
    (tmp_path / INDEX).write_bytes(encode_index(index, 1234))
    assert read_index(tmp_path, INDEX) == index
    assert json.loads((tmp_path / INDEX).read_bytes())["metadata"]["total_size"] == 1234


@pytest.mark.parametrize(
    ("fixture", "tensors", "files"),
    [
        ("llama-3.1-70b-reflection", 723, 162),
        ("mixtral-8x22b-wizardlm2", 1739, 59),
        ("bloom-176b", 845, 72),
    ],
)
def test_a_real_index_reads(fixture: str, tensors: int, files: int) -> None:
    index = read_index(shared(f"fixtures/{fixture}"), INDEX)
    assert len(index.weight_map) == tensors
    assert len(set(index.weight_map.values())) == files


def test_a_real_index_with_merge_conflict_marks_is_called_damaged() -> None:
    with pytest.raises(CheckpointError) as caught:
        read_index(shared("fixtures/bloom-176b-merge-conflict"), INDEX)
    check_error(caught.value, INDEX, "damaged index", "fetch it again")
