"""A checkpoint folder: what is a checkpoint, what is refused, and that the bytes are the bytes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from shardkit.checkpoint import Checkpoint, open_checkpoint
from shardkit.errors import CheckpointError, SourceChanged
from tests.helpers.checkpoint_contents import (
    ONE,
    PAIR,
    PAIR_MAP,
    SINGLE,
    TWO,
    read_tensor,
    read_tensors,
)
from tests.helpers.raw_safetensors import (
    CONFIG,
    INDEX,
    check_error,
    entry,
    file_bytes,
    index_of,
    small_file,
    write_folder,
)
from tests.helpers.real_inputs import shared

# Files of a folder, and the tensors of each of its weights files, in the order of their bytes.
GOOD: dict[str, tuple[dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "a single file": ({SINGLE: small_file("b", "a")}, {SINGLE: ("b", "a")}),
    "a lone file of another name": (
        {"weights.safetensors": small_file("a")}, {"weights.safetensors": ("a",)},
    ),
    "an index over two files": (
        PAIR | {INDEX: index_of(PAIR_MAP, total_size=24)}, {ONE: ("b", "a"), TWO: ("c",)},
    ),
    "an index with a float size": (
        PAIR | {INDEX: index_of(PAIR_MAP, total_size=24.0)}, {ONE: ("b", "a"), TWO: ("c",)},
    ),
    "an index with a size of zero": (
        PAIR | {INDEX: index_of(PAIR_MAP, total_size=0)}, {ONE: ("b", "a"), TWO: ("c",)},
    ),
    "file names of BLOOM's kind": (
        {
            "model_00001-of-00002.safetensors": small_file("a"),
            "model_00002-of-00002.safetensors": small_file("b"),
            INDEX: index_of(
                {"b": "model_00002-of-00002.safetensors", "a": "model_00001-of-00002.safetensors"}
            ),
        },
        {"model_00001-of-00002.safetensors": ("a",), "model_00002-of-00002.safetensors": ("b",)},
    ),
    "files counted from zero": (
        {
            "model-00000-of-00002.safetensors": small_file("a"),
            "model-00001-of-00002.safetensors": small_file("b"),
            INDEX: index_of(
                {"a": "model-00000-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
            ),
        },
        {"model-00000-of-00002.safetensors": ("a",), "model-00001-of-00002.safetensors": ("b",)},
    ),
    "an index naming a lone model.safetensors": (
        {SINGLE: small_file("a"), INDEX: index_of({"a": SINGLE})}, {SINGLE: ("a",)},
    ),
    "an index naming a lone file of another name": (
        {"w.safetensors": small_file("a"), INDEX: index_of({"a": "w.safetensors"})},
        {"w.safetensors": ("a",)},
    ),
    "an index of another prefix": (
        {
            "w.safetensors": small_file("a"),
            "w.safetensors.index.json": index_of({"a": "w.safetensors"}),
        },
        {"w.safetensors": ("a",)},
    ),
    "a layer that spans files": (
        {
            ONE: small_file("layers.0.q", "layers.1.q"),
            TWO: small_file("layers.1.k", "layers.0.k"),
            INDEX: index_of(
                {"layers.0.q": ONE, "layers.0.k": TWO, "layers.1.k": TWO, "layers.1.q": ONE}
            ),
        },
        {ONE: ("layers.0.q", "layers.1.q"), TWO: ("layers.1.k", "layers.0.k")},
    ),
    "a single file beside variants of it": (
        {SINGLE: small_file("a"), "model.fp16.safetensors": small_file("a")}, {SINGLE: ("a",)},
    ),
    "an index beside files it does not name": (
        PAIR | {INDEX: index_of(PAIR_MAP), "adapter_model.safetensors": small_file("x")},
        {ONE: ("b", "a"), TWO: ("c",)},
    ),
    "pickles of the same weights": (
        {SINGLE: small_file("a"), "pytorch_model.bin": b"x", "pytorch_model.bin.index.json": "{"},
        {SINGLE: ("a",)},
    ),
    "Mistral's own form beside the file": (
        {SINGLE: small_file("a"), "consolidated.safetensors": small_file("z")}, {SINGLE: ("a",)},
    ),
    "Mistral's own form and index beside the index": (
        PAIR
        | {
            INDEX: index_of(PAIR_MAP),
            "consolidated-00001-of-00001.safetensors": small_file("z"),
            "consolidated.safetensors.index.json": index_of({"z": "elsewhere.safetensors"}),
        },
        {ONE: ("b", "a"), TWO: ("c",)},
    ),
    "a file of no tensors": ({SINGLE: file_bytes("{}")}, {SINGLE: ()}),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_a_checkpoint_opens_with_its_files_and_bytes(case: str, tmp_path: Path) -> None:
    files, expected = GOOD[case]
    folder = write_folder(tmp_path, files)
    with open_checkpoint(str(folder)) as checkpoint:
        assert {file.name: file.tensors for file in checkpoint.files} == expected
        assert [s.name for s in checkpoint.specs()] == [n for t in expected.values() for n in t]
        read = read_tensors(checkpoint)
    for name in expected:
        with safe_open(folder / name, "np") as file:
            theirs = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        assert {key: read[key] for key in theirs} == theirs


def test_a_tensor_is_read_from_any_byte(tmp_path: Path) -> None:
    data = bytes(range(48))
    table = {"a": entry("U8", [16], 0, 16), "b": entry("BF16", [4, 4], 16, 48)}
    with Checkpoint(write_folder(tmp_path, {SINGLE: file_bytes(table, data)})) as checkpoint:
        for offset, size in [(0, 32), (0, 1), (31, 1), (5, 20), (32, 0)]:
            found = bytearray(size)
            checkpoint.read_into("b", offset, memoryview(found))
            assert found == data[16 + offset : 16 + offset + size]


def test_a_snapshot_of_a_hub_cache_is_followed_into_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blobs = write_folder(repo / "blobs", {"f00d": small_file("a")})
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    (snapshot / SINGLE).symlink_to("../../blobs/f00d")
    with Checkpoint(snapshot) as checkpoint:
        assert read_tensors(checkpoint) == {"a": b"a......."}
        assert dict(checkpoint.companions()) == {
            "config.json": (blobs / "config.json").read_bytes()
        }


def test_a_snapshot_is_not_followed_past_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = write_folder(repo / "snapshots" / ("0" * 40), {})
    other = tmp_path / "models--org--other" / "blobs"
    write_folder(other, {"f00d": small_file("a")})
    (snapshot / SINGLE).symlink_to(other / "f00d")
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint(snapshot)


def test_a_link_inside_the_folder_and_a_linked_folder_are_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"stored": small_file("a")})
    (folder / SINGLE).symlink_to("stored")
    (tmp_path / "latest").symlink_to("model")
    with open_checkpoint(str(tmp_path / "latest")) as checkpoint:
        assert read_tensors(checkpoint) == {"a": b"a......."}


def test_companions_are_the_small_files_and_never_code_weights_or_indices(tmp_path: Path) -> None:
    wanted = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "tokenizer.model": b"\0\1",
        "merges.txt": b"a b\n",
        "chat_template.jinja": b"{{ x }}",
    }
    other = {
        "modeling_evil.py": b"",
        "pytorch_model.bin": b"",
        "pytorch_model.bin.index.json": b"{}",
        "README.md": b"",
        "manifest.json": b"{}",
        SINGLE: small_file("a"),
        INDEX: json.dumps(index_of({"a": SINGLE})).encode(),
    }
    folder = write_folder(tmp_path, wanted | other)
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "fifo.json")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_bytes(b"")
    with Checkpoint(folder) as checkpoint:
        assert dict(checkpoint.companions()) == wanted


def test_a_companion_linked_from_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = write_folder(tmp_path / "model", {SINGLE: small_file("a")})
    (folder / "vocab.txt").symlink_to("../secret.txt")
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="outside"):
        list(checkpoint.companions())


def test_a_file_cut_while_it_is_open_is_noticed_when_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {SINGLE: small_file("a", "b")})
    with Checkpoint(folder) as checkpoint:
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)
        with pytest.raises(SourceChanged) as caught:
            read_tensor(checkpoint, "b")
    check_error(caught.value, SINGLE, "became shorter")


def test_a_file_written_to_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {SINGLE: small_file("a")})
    with Checkpoint(folder) as checkpoint:
        checkpoint.check_unchanged()
        with (folder / SINGLE).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        os.utime(folder / SINGLE, ns=(0, 0))
        with pytest.raises(SourceChanged) as caught:
            checkpoint.check_unchanged()
    check_error(caught.value, SINGLE, "changed")


def test_a_file_replaced_while_it_is_open_is_read_as_it_was(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {SINGLE: small_file("a")})
    with Checkpoint(folder) as checkpoint:
        (folder / "new").write_bytes(small_file("z"))
        (folder / "new").replace(folder / SINGLE)
        assert read_tensors(checkpoint) == {"a": b"a......."}


def test_samples_of_checkpoints_differ_in_name_shape_dtype_and_ends(tmp_path: Path) -> None:
    def sample(name: str, dtype: str, shape: list[int], data: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        table = {name: entry(dtype, shape, 0, len(data))}
        with Checkpoint(write_folder(folder, {SINGLE: file_bytes(table, data)})) as checkpoint:
            return checkpoint.fingerprint()

    zero = bytes(32768)
    base = sample("a", "U8", [32768], zero)
    assert sample("a", "U8", [32768], zero) == base
    others = {
        sample("b", "U8", [32768], zero),
        sample("a", "I8", [32768], zero),
        sample("a", "U8", [256, 128], zero),
        sample("a", "U8", [32768], b"\1" + zero[1:]),
        sample("a", "U8", [32768], zero[1:] + b"\1"),
    }
    assert len(others | {base}) == 6


@pytest.mark.parametrize("config", [{}, {"model_type": ""}, {"model_type": 3}], ids=str)
def test_a_config_without_model_type_is_refused_when_it_is_asked_for(
    config: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, {SINGLE: small_file("a"), "config.json": config})
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.model_type  # noqa: B018
    check_error(caught.value, "config.json", "model_type")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(write_folder(tmp_path, {SINGLE: small_file("a")})), "main")
    check_error(caught.value, "revision", "leave --revision out")


def test_a_real_last_file_of_bloom_opens_as_a_lone_file(tmp_path: Path) -> None:
    fixture = shared("fixtures/bloom-176b")
    for name in ("config.json", "model_00072-of-00072.safetensors"):
        shutil.copy(fixture / name, tmp_path)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.model_type == "bloom"
        assert {spec.dtype for spec in checkpoint.specs()} == {"BF16"}


def test_real_weights_in_three_files_hold_the_same_bytes_as_in_one() -> None:
    with (
        open_checkpoint(str(shared("models/stories260K"))) as whole,
        open_checkpoint(str(shared("models/stories260K-sharded"))) as parts,
    ):
        assert len(parts.files) == 3
        assert read_tensors(parts) == read_tensors(whole)
