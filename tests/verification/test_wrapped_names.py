"""A checkpoint saved with a wrapper's prefix: planned, split, run, verified and merged."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shardkit.authoring.rank_pool import RankPool
from shardkit.convert import split
from shardkit.shards import MANIFEST_NAME
from shardkit.shards.reader import ShardedCheckpoint
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from tests.helpers.command_line import run
from tests.helpers.model_samples import make
from tests.helpers.raw_safetensors import INDEX

SINGLE = "model.safetensors"
# A prefix, and a sample: of the model's own names, with a base model's prefix, and of experts
# that the model stacks.
CASES = [
    ("_orig_mod.", "llama"), ("module.", "bert"), ("base_model.model.", "gpt2"),
    ("_fsdp_wrapped_module._orig_mod.", "mixtral"),
]  # fmt: skip


def wrap(folder: Path, prefix: str) -> Path:
    """Put a prefix before every name of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE)
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()},
        folder / SINGLE,
        {"format": "pt"},
    )
    return folder


def numerics(shards: Path, source: Path, pool: RankPool) -> str:
    with ShardedCheckpoint(shards) as opened:
        manifest = opened.manifest
    check = check_numerics(shards, manifest, source, ShardedModel(pool.of(2)))
    assert check.verdict == "passed", check
    return check.summary


@pytest.mark.parametrize(("prefix", "name"), CASES, ids=[prefix for prefix, _ in CASES])
def test_a_wrapped_checkpoint_runs_and_merges_to_the_source(
    prefix: str, name: str, rank_pool: RankPool, tmp_path: Path
) -> None:
    source, shards = wrap(make(name, tmp_path / "source"), prefix), tmp_path / "shards"
    planned = run("plan", source, "--tp", "2")
    assert f"Prefix       {prefix} before every tensor's name" in planned.stdout
    split(source, shards, 2)
    assert json.loads((shards / MANIFEST_NAME).read_text())["wrapper_prefix"] == prefix
    levels = run("verify", shards, "--against", source, "--level", "weights")
    assert levels.exit_code == 0, levels.output
    numerics(shards, source, rank_pool)
    assert run("merge", shards, tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
    assert run("reshard", shards, tmp_path / "one", "--tp", "1").exit_code == 0
    assert json.loads((tmp_path / "one" / MANIFEST_NAME).read_text())["wrapper_prefix"] == prefix


def test_without_a_prefix_the_manifest_says_nothing_of_one(tmp_path: Path) -> None:
    split(make("llama", tmp_path / "source"), tmp_path / "shards", 2)
    assert "wrapper_prefix" not in json.loads((tmp_path / "shards" / MANIFEST_NAME).read_text())


def test_the_reference_reads_a_whole_set_that_has_no_index(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    tensors = load_file(source / SINGLE)
    (source / SINGLE).unlink()
    for at in (1, 2):
        part = dict(list(tensors.items())[at - 1 :: 2])
        save_file(part, source / f"model-{at:05d}-of-00002.safetensors", {"format": "pt"})
    assert not (source / INDEX).exists()
    split(source, tmp_path / "shards", 2)
    numerics(tmp_path / "shards", source, rank_pool)
    run("merge", tmp_path / "shards", tmp_path / "again")
    shutil.rmtree(source)
    numerics(tmp_path / "shards", tmp_path / "again", rank_pool)
