"""NaN and infinite values: counted as torch counts them, noted in the manifest, told or refused."""

import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardkit.checkpoint import Checkpoint
from shardkit.dtypes import DTYPES
from shardkit.output import nonfinite
from shardkit.output import writer as file_sink
from shardkit.output.nonfinite import count_nonfinite
from shardkit.output.publish import JOURNAL
from shardkit.shards.manifest_json import read_manifest
from tests.helpers.command_line import run
from tests.helpers.split_helpers import reshard_folder, split_folder
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    specs_of,
    write_source,
)

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NORM, DOWN, KEY = (
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
)


def by_torch(data: bytes, dtype: torch.dtype) -> int:
    values = torch.frombuffer(bytearray(data), dtype=dtype)
    return int((~torch.isfinite(values.double())).sum())


def patterns(dtype: str) -> bytes:
    """Every value of at most 16 bits; of wider ones, every top 16 bits before zeros and ones."""
    width = DTYPES[dtype].bits // 8
    if width == 1:
        return bytes(range(256))
    every = [value.to_bytes(2, "little") for value in range(1 << 16)]
    if width == 2:
        return b"".join(every)
    return b"".join(low * (width - 2) + top for top in every for low in (b"\0", b"\1", b"\xff"))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_pattern_is_judged_as_torch_does(dtype: str) -> None:
    data = patterns(dtype)
    width = DTYPES[dtype].bits // 8
    for start in range(0, len(data), 1 << 12):
        part = data[start : start + (1 << 12) // width * width]
        assert count_nonfinite(memoryview(part), dtype) == by_torch(part, TORCH_DTYPES[dtype])
    assert count_nonfinite(memoryview(data), dtype) == by_torch(data, TORCH_DTYPES[dtype]) > 0


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - TORCH_DTYPES.keys() - {"C64"}))
def test_integers_and_floats_without_such_values_have_none(dtype: str) -> None:
    assert count_nonfinite(memoryview(b"\xff" * 64 + b"\x80" * 64), dtype) == 0


def test_a_complex_number_counts_by_its_parts() -> None:
    values = torch.tensor([complex("nan+nanj"), complex("inf+1j"), 1 + 1j], dtype=torch.complex64)
    data = bytes(values.view(torch.uint8).tolist())
    assert count_nonfinite(memoryview(data), "C64") == 3


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_values_at_the_seams_of_blocks_are_counted(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonfinite, "BLOCK_BYTES", 64)
    data = random.Random(3).randbytes(64 * 50 + 32)
    assert count_nonfinite(memoryview(data), dtype) == by_torch(data, TORCH_DTYPES[dtype]) > 0


def spoiled(folder: Path, values: Mapping[str, list[float]], dtype: str = "F32") -> Path:
    """A small Llama, the first values of some tensors replaced."""
    write_source(folder, llama_config(), specs_of(llama(), dtype))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, first in values.items():
        tensors[name].view(-1)[: len(first)] = torch.tensor(first)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    nan, inf = float("nan"), float("inf")
    return spoiled(tmp_path / "source", {NORM: [nan], DOWN: [inf, -inf, 1, nan], KEY: [nan, nan]})


def counted(path: Path) -> dict[str, int]:
    """What torch counts in a file."""
    found = {name: int((~value.isfinite()).sum()) for name, value in load_file(path).items()}
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_the_manifest_has_each_piece_s_count(source: Path, tmp_path: Path, tp_size: int) -> None:
    split_folder(source, tmp_path / "out", tp_size)
    manifest = read_manifest(tmp_path / "out")
    total: Counter[str] = Counter()
    for rank in manifest.ranks:
        assert rank.nonfinite == counted(tmp_path / "out" / rank.name)
        total.update(rank.nonfinite)
    assert manifest.nonfinite == total
    assert total[NORM] == tp_size
    assert total[DOWN] >= 3


def test_a_reshard_counts_as_a_split_does(source: Path, tmp_path: Path) -> None:
    split_folder(source, tmp_path / "two", 2)
    split_folder(source, tmp_path / "three", 3)
    reshard_folder(tmp_path / "two", tmp_path / "out", 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "three")


def test_a_resumed_split_counts_what_was_written_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_sink, "JOURNAL_INTERVAL", 700)
    whole = split_folder(source, tmp_path / "whole", 2)
    copied, most = 0, sum(rank.digest.size for rank in whole.ranks)

    def interrupt(count: int) -> None:
        nonlocal copied
        copied += count
        if copied > most * 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_folder(source, tmp_path / "out", 2, progress=interrupt, resume=True)
    (stage,) = tmp_path.glob(".out.*stage*")
    assert len((stage / JOURNAL).read_bytes().splitlines()) > 2
    split_folder(source, tmp_path / "out", 2, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finite_source_has_no_counts(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", {NORM: [1.0]}, "BF16")
    assert split_folder(source, tmp_path / "out", 2, fail_on_nonfinite=True).nonfinite == {}


def test_such_values_are_copied_and_told(source: Path, tmp_path: Path) -> None:
    result = run("split", source, tmp_path / "out", "--tp", "1", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)["nonfinite"]
    assert found == {NORM: 1, DOWN: 3, KEY: 2}
    first = next(iter(found))
    assert result.stderr == (
        f"Warning: {found[first]} values of {first} are NaN or infinite, and so are some of 2 more"
        " tensors; copied as they are\n"
    )
    with Checkpoint(source) as ours:
        data = bytearray(16)
        ours.read_into(DOWN, 0, memoryview(data))
    merged = run("merge", tmp_path / "out", tmp_path / "merged")
    assert merged.exit_code == 0
    with Checkpoint(tmp_path / "merged") as theirs:
        again = bytearray(16)
        theirs.read_into(DOWN, 0, memoryview(again))
    assert data == again
    inspected = run("inspect", tmp_path / "out")
    assert f"Values    {found[first]} values of {first} are NaN or infinite" in inspected.stdout


def test_such_values_are_refused_where_that_is_asked(source: Path, tmp_path: Path) -> None:
    result = run("split", source, tmp_path / "out", "--tp", "2", "--fail-on-nonfinite")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "are NaN or infinite" in result.stderr
    assert "leave out --fail-on-nonfinite" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
