"""Split, merge and reshard: the right bytes, all of them, or nothing at all."""

import json
import os
import random
from pathlib import Path

import pytest

from shardkit.checkpoint.header import encode_header, read_header
from shardkit.dtypes import DTYPES
from shardkit.errors import (
    LayoutError,
    RecipeError,
)
from shardkit.planning import Mesh
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
    llama_source,
    specs_of,
    tensor_bytes,
    write_source,
)

WHOLE_BYTES = [name for name, dtype in DTYPES.items() if dtype.bits >= 8]
NO_BIASES = {name: shape for name, shape in llama().items() if len(shape) > 1}
UP = "model.layers.0.mlp.up_proj.weight"


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
