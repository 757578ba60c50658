"""Streaming: every byte of the source is read once, in blocks of any size."""

from contextlib import closing
from pathlib import Path

import pytest

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.header import read_header
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.layout import STYLES
from shardkit.layout.axis import Term
from shardkit.output import stream
from shardkit.planning import make_plan
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.recipe import Recipe, Rule, UnitRule
from shardkit.shards import integrity
from tests.helpers.split_helpers import (
    assert_shards_hold_their_spans,
    merge_folder,
    reshard_folder,
    split_folder,
)
from tests.helpers.synthetic_checkpoints import (
    FAMILIES,
    contents,
    llama_source,
    specs_of,
    write_source,
)


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
    counts: list[int] = []
    source = llama_source(tmp_path / "source")
    manifest = split_folder(source, tmp_path / "shards", 2, progress=counts.append)
    headers = sum(len(read_header(tmp_path / "shards" / r.name).raw) + 8 for r in manifest.ranks)
    assert sum(counts) == sum(rank.digest.size for rank in manifest.ranks) - headers


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
