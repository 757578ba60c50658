"""Split, merge and reshard: the right bytes, all of them, or nothing at all."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.header import encode_header, read_header
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.dtypes import DTYPES
from shardkit.errors import (
    LayoutError,
    ManifestError,
    OutputError,
    RecipeError,
    ShardkitError,
    SourceChanged,
)
from shardkit.layout import STYLES
from shardkit.layout.axis import Term
from shardkit.output import stream
from shardkit.planning import Mesh
from shardkit.planning.placement import make_plan
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.recipe import Recipe, Rule, UnitRule
from shardkit.shards import integrity
from shardkit.tensor import TensorSpec
from tests.helpers.split_helpers import (
    assert_shards_hold_their_spans,
    merge_folder,
    reshard_folder,
    shard_name,
    split_folder,
)
from tests.helpers.synthetic_checkpoints import (
    FAMILIES,
    INDEX,
    contents,
    file_of,
    llama,
    llama_config,
    specs_of,
    tensor_bytes,
    write_source,
)

WHOLE_BYTES = [name for name, dtype in DTYPES.items() if dtype.bits >= 8]
NO_BIASES = {name: shape for name, shape in llama().items() if len(shape) > 1}
UP = "model.layers.0.mlp.up_proj.weight"


def llama_source(folder: Path, **sizes: int) -> Path:
    config = {k: v for k, v in sizes.items() if k in ("heads", "kv", "ffn")}
    return write_source(folder, llama_config(**config), specs_of(llama(**sizes)))


def check_round_trip(source: Path, tmp_path: Path, tp_size: int) -> None:
    manifest = split_folder(source, tmp_path / "shards", tp_size)
    assert_shards_hold_their_spans(tmp_path / "shards", manifest)
    merge_folder(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(source)


@pytest.mark.parametrize("dtype", WHOLE_BYTES)
def test_every_dtype_is_split_by_its_bytes_and_merges_back(dtype: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", llama_config(), specs_of(llama(), dtype))
    check_round_trip(source, tmp_path, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_family_is_split_by_its_spans_and_merges_back(
    family: str, tp_size: int, tmp_path: Path
) -> None:
    config, shapes = FAMILIES[family]
    source = write_source(tmp_path / "source", config, specs_of(shapes, "F32"))
    check_round_trip(source, tmp_path, tp_size)


@pytest.mark.parametrize(
    ("heads", "kv", "tp_size"), [(8, 2, 4), (8, 1, 8), (14, 2, 4), (9, 3, 2), (9, 3, 7), (10, 5, 3)]
)
def test_shared_uneven_and_copied_heads_merge_back(
    heads: int, kv: int, tp_size: int, tmp_path: Path
) -> None:
    source = llama_source(tmp_path / "source", heads=heads, kv=kv, ffn=23, vocab=41)
    check_round_trip(source, tmp_path, tp_size)


def test_an_indexed_source_merges_into_its_own_files(tmp_path: Path) -> None:
    specs = specs_of(llama(), "F16")
    random.Random(5).shuffle(specs)  # as nobody sorted them
    source = write_source(
        tmp_path / "source",
        llama_config(),
        specs,
        lambda at: f"model_{at * 7 % 3:05d}-of-00002.safetensors",  # every layer spans the files
    )
    check_round_trip(source, tmp_path, 2)


@pytest.mark.parametrize("total_size", [0, 1, 12.0, "12", -4, [], 1 << 70])
def test_an_index_whose_total_size_is_wrong_comes_back_correct(
    total_size: object, tmp_path: Path
) -> None:
    specs = specs_of(llama())
    source = write_source(
        tmp_path / "source", llama_config(), specs, lambda _: "a.safetensors", total_size
    )
    split_folder(source, tmp_path / "shards", 2)
    merge_folder(tmp_path / "shards", tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(spec.nbytes for spec in specs)}
    assert index["weight_map"] == {spec.name: "a.safetensors" for spec in specs}


def test_metadata_comes_back_in_its_own_order(tmp_path: Path) -> None:
    # The safetensors library writes a file's metadata in no order of its own.
    source = llama_source(tmp_path / "source")
    metadata = {"zeta": "1", "format": "pt", "alpha": "2"}
    (source / "model.safetensors").write_bytes(file_of(specs_of(llama()), metadata))
    check_round_trip(source, tmp_path, 2)


def test_an_indexs_own_counts_and_strings_come_back(tmp_path: Path) -> None:
    source = write_source(
        tmp_path / "source", llama_config(), specs_of(llama()), lambda _: "a.safetensors"
    )
    index = json.loads((source / INDEX).read_text())
    index["metadata"] |= {"total_parameters": 7048, "by": "someone"}
    (source / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    check_round_trip(source, tmp_path, 2)


def mixed_specs() -> list[TensorSpec]:
    dtypes = ["U8", "F64", "BF16", "BOOL", "F32", "I8", "I64", "F16"]
    shapes = {**llama(vocab=41, ffn=23), "model.norm.weight": (3,)}
    return [TensorSpec(n, dtypes[i % 8], s) for i, (n, s) in enumerate(shapes.items())]


def test_mixed_dtypes_stay_aligned_and_merge_back(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", llama_config(ffn=23), mixed_specs())
    manifest = split_folder(source, tmp_path / "shards", 3)
    for rank in manifest.ranks:
        for entry in read_header(tmp_path / "shards" / rank.name).entries:
            assert entry.start % (DTYPES[entry.spec.dtype].bits // 8) == 0, entry.spec
    merge_folder(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(source)


def test_the_safetensors_library_reads_in_a_shard_what_it_reads_in_the_source(
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    source = write_source(tmp_path / "source", llama_config(ffn=23), mixed_specs())
    manifest = split_folder(source, tmp_path / "shards", 3)
    with safe_open(source / "model.safetensors", "pt") as whole:
        for rank in range(3):
            with safe_open(tmp_path / "shards" / shard_name(rank, 3), "pt") as shard:
                assert shard.metadata()["tp_rank"] == str(rank)
                for name in shard.keys():  # noqa: SIM118  (it is no dict)
                    placement, expected = manifest.placements[name], whole.get_tensor(name)
                    if placement.dim is not None:
                        parts = placement.spans(Mesh(3).rank(rank))
                        rows = torch.cat([torch.arange(start, stop) for start, stop in parts])
                        expected = expected.index_select(placement.dim, rows)
                    found = shard.get_tensor(name)
                    assert found.dtype == expected.dtype
                    assert found.shape == expected.shape
                    as_bytes = [t.contiguous().view(torch.uint8) for t in (found, expected)]
                    assert torch.equal(*as_bytes)


@pytest.mark.parametrize(("heads", "kv"), [(8, 4), (12, 2)])
def test_resharding_writes_what_a_direct_split_writes(heads: int, kv: int, tmp_path: Path) -> None:
    source = llama_source(tmp_path / "source", heads=heads, kv=kv, ffn=23)
    last = tmp_path / "from-2"
    split_folder(source, last, 2)
    for tp_size in (4, 3, 1):
        reshard_folder(last, tmp_path / f"to-{tp_size}", tp_size)
        split_folder(source, tmp_path / f"direct-{tp_size}", tp_size)
        last = tmp_path / f"to-{tp_size}"
        assert contents(last) == contents(tmp_path / f"direct-{tp_size}")


def test_resharding_over_too_many_ranks_writes_nothing(tmp_path: Path) -> None:
    split_folder(llama_source(tmp_path / "source"), tmp_path / "shards", 2)
    with pytest.raises(LayoutError, match="tp_size 1 to 8"):
        reshard_folder(tmp_path / "shards", tmp_path / "out", 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "source"]


def test_splitting_twice_gives_identical_folders(tmp_path: Path) -> None:
    source = llama_source(tmp_path / "source")
    for name in ("one", "two"):
        split_folder(source, tmp_path / name, 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_companion_files_are_copied_and_code_is_not(tmp_path: Path) -> None:
    source = llama_source(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(b'{"odd": "\xff"}')
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    split_folder(source, tmp_path / "shards", 2)
    names = {
        "config.json",
        "tokenizer.json",
        "manifest.json",
        shard_name(0, 2),
        shard_name(1, 2),
    }
    assert contents(tmp_path / "shards").keys() == names
    assert (tmp_path / "shards/tokenizer.json").read_bytes() == b'{"odd": "\xff"}'


def test_scalars_and_empty_tensors_are_kept(tmp_path: Path) -> None:
    shapes = llama() | {
        "model.norm.weight": (0, 8),
        "model.layers.0.self_attn.q_norm.weight": (),
        "model.layers.0.self_attn.q_proj.weight": (0, 8),
        "model.layers.0.self_attn.k_proj.weight": (16, 0),
        "model.layers.0.self_attn.o_proj.weight": (8, 0),
        UP: (),
    }
    source = write_source(tmp_path / "source", llama_config(), specs_of(shapes))
    check_round_trip(source, tmp_path, 4)


def test_an_empty_axis_without_a_count_is_refused_with_the_tensor(tmp_path: Path) -> None:
    shapes = {**llama(), "lm_head.weight": (0, 8)}
    source = write_source(tmp_path / "source", llama_config(), specs_of(shapes))
    with pytest.raises(RecipeError, match=r"^lm_head.weight: axis of 0"):
        split_folder(source, tmp_path / "shards", 2)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_dtypes_are_cut_between_bytes_only(dtype: str, tmp_path: Path) -> None:
    columns = {n: s for n, s in NO_BIASES.items() if "o_proj" not in n and "down" not in n}
    source = write_source(tmp_path / "ends", llama_config(), specs_of(columns, dtype))
    manifest = split_folder(source, tmp_path / "shards", 2)
    assert manifest.ranks[0].digest.size < (source / "model.safetensors").stat().st_size
    merge_folder(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(source)
    rows = write_source(tmp_path / "rows", llama_config(), specs_of(NO_BIASES, dtype))
    with pytest.raises(LayoutError, match=r"^\S*o_proj.weight: \d bits of F\S+ do not end on"):
        split_folder(rows, tmp_path / "refused", 2)


def expert_recipe() -> Recipe:
    """Stacked experts `[experts, out, in]`, and the same transposed."""
    ffn = (Term((), "ffn"),)
    rules = (
        Rule("up", STYLES["column"], ffn), Rule("down", STYLES["row"], ffn),
        Rule("gate", STYLES["column"], (Term((2,), "ffn"),)),
        Rule("up_t", STYLES["column"], ffn, True), Rule("down_t", STYLES["row"], ffn, True),
        Rule("kv", STYLES["column"], (Term((), "heads"), Term((), "kv")), True),
        Rule("norm", STYLES["replicate"]), Rule("mask", STYLES["ignore"]),
    )  # fmt: skip
    units = {
        "ffn": UnitRule(("ffn",)), "heads": UnitRule(("heads",)), "kv": UnitRule(("kv",), "heads"),
    }  # fmt: skip
    return Recipe("experts", "0" * 64, ("experts",), rules, units)


def expert_source(folder: Path) -> Path:
    shapes = {
        "up": (3, 24, 10), "down": (3, 10, 24), "gate": (3, 48, 10), "up_t": (3, 10, 24),
        "down_t": (3, 24, 10), "kv": (5, 32), "norm": (600,), "mask": (1, 900),
    }  # fmt: skip
    config = {"model_type": "experts", "ffn": 24, "heads": 14, "kv": 2}
    return write_source(folder, config, specs_of(shapes, "F32"))


@pytest.mark.parametrize("block", [16, 100, 1000, 4096])
def test_tensors_larger_than_a_block_are_streamed_in_every_layout(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BUFFER_BYTES", block)
    monkeypatch.setattr(integrity, "READ_BYTES", block)
    source = expert_source(tmp_path / "source")
    manifest = split_folder(source, tmp_path / "shards", 4, expert_recipe())
    assert_shards_hold_their_spans(tmp_path / "shards", manifest)
    merge_folder(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(source)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "llama"])
@pytest.mark.parametrize("block", [50, 1024])
def test_the_size_of_a_block_changes_nothing(
    family: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shapes = FAMILIES[family]
    source = write_source(tmp_path / "source", config, specs_of(shapes))
    split_folder(source, tmp_path / "usual", 3)
    monkeypatch.setattr(stream, "BUFFER_BYTES", block)
    split_folder(source, tmp_path / "blocks", 3)
    assert contents(tmp_path / "usual") == contents(tmp_path / "blocks")
    reshard_folder(tmp_path / "blocks", tmp_path / "to-2", 2)
    split_folder(source, tmp_path / "direct", 2)
    assert contents(tmp_path / "to-2") == contents(tmp_path / "direct")


def test_progress_counts_every_byte_that_is_written(tmp_path: Path) -> None:
    told: list[int] = []
    source = llama_source(tmp_path / "source")
    manifest = split_folder(source, tmp_path / "shards", 2, progress=told.append)
    headers = sum(len(read_header(tmp_path / "shards" / r.name).raw) + 8 for r in manifest.ranks)
    assert sum(told) == sum(rank.digest.size for rank in manifest.ranks) - headers


class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts the bytes read from it."""

    read = 0

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        self.read += len(view)
        super().read_into(name, offset, view)


@pytest.mark.parametrize("block", [64, 4096])
def test_each_source_byte_is_read_once_however_many_ranks_hold_it(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BUFFER_BYTES", block)
    with closing(CountingCheckpoint(llama_source(tmp_path / "source", heads=8, kv=2))) as source:
        source.fingerprint()
        sampled = source.read
        recipe = find_recipe({"model_type": "llama"})
        plan = make_plan(source.specs(), recipe, source.config, 4)
        split_checkpoint(source, plan, recipe, shard_destination(tmp_path / "shards"))
        assert source.read - 2 * sampled == sum(spec.nbytes for spec in source.specs())


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def modify(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")


def shorten(path: Path) -> None:
    os.truncate(path, 900)


@pytest.mark.parametrize("change", [append, modify, shorten])
def test_a_source_that_changes_during_the_copy_is_refused_and_nothing_is_left(
    change: Any, tmp_path: Path
) -> None:
    source = llama_source(tmp_path / "source")
    file = source / "model.safetensors"
    os.utime(file, (1, 1))  # long ago: a clock that ticks slowly must not hide the change
    with pytest.raises(SourceChanged, match=r"model.safetensors: (changed|became shorter)"):
        split_folder(source, tmp_path / "shards", 2, progress=lambda _: change(file))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_stops_a_split_nothing_is_left(error: type[BaseException], tmp_path: Path) -> None:
    source = llama_source(tmp_path / "source")

    def stop(_: int) -> None:
        raise error

    with pytest.raises(error):
        split_folder(source, tmp_path / "shards", 2, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_exists_is_never_touched(kind: str, tmp_path: Path) -> None:
    source, out = llama_source(tmp_path / "source"), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = out.lstat()
    split_folder(source, tmp_path / "shards", 2)
    for attempt in (
        lambda: split_folder(source, out, 2),
        lambda: merge_folder(tmp_path / "shards", out),
        lambda: reshard_folder(tmp_path / "shards", out, 4),
    ):
        with pytest.raises(OutputError, match="out: exists"):
            attempt()
    assert out.lstat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "shards", "source"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(options, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk cannot be tried: no mount command")
    if done.returncode:
        pytest.skip(f"a full disk cannot be tried: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.root
def test_a_split_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path, tiny_disk: Path
) -> None:
    source = llama_source(tmp_path / "source", vocab=4000)
    with pytest.raises(OutputError, match=r"needs 0.00 GB, and its filesystem has 0.00 GB free"):
        split_folder(source, tiny_disk / "out", 2)
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.root
def test_a_disk_that_is_filled_by_others_meanwhile_leaves_nothing(
    tmp_path: Path, tiny_disk: Path
) -> None:
    source = llama_source(tmp_path / "source")

    def fill(_: int) -> None:
        with suppress(OSError), (tiny_disk / "hog").open("ab", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass

    with pytest.raises(OutputError, match="No space left on device"):
        split_folder(source, tiny_disk / "out", 2, progress=fill)
    assert [path.name for path in tiny_disk.iterdir()] == ["hog"]
    (tiny_disk / "hog").unlink()
    split_folder(source, tiny_disk / "out", 2)


@pytest.mark.root
def test_companions_that_do_not_fit_leave_nothing(tmp_path: Path, tiny_disk: Path) -> None:
    source = llama_source(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(bytes(300_000))
    with pytest.raises(OutputError, match=r"No space left|needs"):
        split_folder(source, tiny_disk / "out", 2)
    assert list(tiny_disk.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.helpers.split_helpers import split_folder

left = int(sys.argv[3])

def progress(_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

split_folder(Path(sys.argv[1]), Path(sys.argv[2]), 2, progress=progress)
"""


@pytest.mark.parametrize("calls", [1, 9, 21])
def test_a_killed_split_leaves_no_output_and_the_next_run_cleans_up(
    calls: int, tmp_path: Path
) -> None:
    source, out = llama_source(tmp_path / "source"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(calls)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path()}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 2, "the stage of the killed run is there"
    split_folder(source, out, 2)
    split_folder(source, tmp_path / "again", 2)
    assert contents(out) == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "source"]


def python_path() -> str:
    return str(Path(__file__).resolve().parents[2])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A split over two ranks."""
    split_folder(llama_source(tmp_path / "source"), tmp_path / "shards", 2)
    return tmp_path / "shards"


def refused(shards: Path, tmp_path: Path) -> str:
    """What merge says, and that it wrote nothing."""
    with pytest.raises(ShardkitError) as caught:
        merge_folder(shards, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))
    assert not list(tmp_path.glob(".*merged*"))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_truncated_shard_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    path = shards / shard_name(1, 2)
    os.truncate(path, path.stat().st_size - 1)
    assert f"{path}: truncated" in refused(shards, tmp_path)


def test_an_extended_shard_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    append(shards / shard_name(0, 2))
    assert f"{shards / shard_name(0, 2)}: extended" in refused(shards, tmp_path)


def test_one_flipped_bit_is_found_and_its_file_and_tensor_named(
    shards: Path, tmp_path: Path
) -> None:
    path = shards / shard_name(1, 2)
    sound = path.read_bytes()
    for entry in read_header(path).entries:
        for at in (entry.start, entry.stop - 1):
            damaged = bytearray(sound)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            text = refused(shards, tmp_path)
            assert f"{path}: rank 1: {entry.spec.name}: damaged" in text


def test_a_flipped_bit_in_a_header_is_found(shards: Path, tmp_path: Path) -> None:
    path = shards / shard_name(0, 2)
    sound = path.read_bytes()
    for at in (0, 7, 8, 60, 200, 400):
        damaged = bytearray(sound)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert str(path) in refused(shards, tmp_path)


def test_every_damaged_shard_is_named(shards: Path, tmp_path: Path) -> None:
    for rank in range(2):
        modify(shards / shard_name(rank, 2))
    text = refused(shards, tmp_path)
    assert shard_name(0, 2) in text
    assert shard_name(1, 2) in text


def test_swapped_shards_are_told_apart(shards: Path, tmp_path: Path) -> None:
    one, two, spare = (shards / name for name in (shard_name(0, 2), shard_name(1, 2), "spare"))
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert "is the file of rank '1', renamed" in refused(shards, tmp_path)


def test_a_shard_of_another_split_is_refused(shards: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", llama_config(), other_weights())
    split_folder(other, tmp_path / "foreign", 2)
    name = shard_name(0, 2)
    (shards / name).write_bytes((tmp_path / "foreign" / name).read_bytes())
    assert "of another split" in refused(shards, tmp_path)


def other_weights() -> list[TensorSpec]:
    """The same names and shapes in another order, so that other bytes begin each tensor."""
    return specs_of(llama())[::-1]


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path) -> None:
    (shards / shard_name(1, 2)).unlink()
    assert f"{shard_name(1, 2)}: missing" in refused(shards, tmp_path)


def test_a_shard_that_is_a_link_or_a_pipe_is_refused(shards: Path, tmp_path: Path) -> None:
    path = shards / shard_name(1, 2)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert str(path) in refused(shards, tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refused(shards, tmp_path)


def test_a_companion_that_was_changed_is_refused(shards: Path, tmp_path: Path) -> None:
    (shards / "config.json").write_text("{}")
    assert "config.json: not the file that was copied" in refused(shards, tmp_path)


def test_a_folder_without_a_manifest_is_an_unfinished_split(shards: Path, tmp_path: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="not a shard folder, or unfinished"):
        merge_folder(shards, tmp_path / "merged")


def test_a_source_folder_whose_name_is_no_text_can_be_split(tmp_path: Path) -> None:
    source = llama_source(tmp_path / os.fsdecode(b"model-\xff"))
    manifest = split_folder(source, tmp_path / "shards", 2)
    assert manifest.source.id.startswith("model-")
    merge_folder(tmp_path / "shards", tmp_path / "merged")


def test_a_source_without_tensors_can_be_split(tmp_path: Path) -> None:
    check_round_trip(write_source(tmp_path / "source", llama_config(), []), tmp_path, 2)


def test_the_bytes_under_test_differ_from_tensor_to_tensor() -> None:
    specs = specs_of(llama())
    assert len({tensor_bytes(spec) for spec in specs}) == len(specs)
    assert len(encode_header(specs, {})) % 8 == 0
