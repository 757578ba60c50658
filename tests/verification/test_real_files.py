"""Checkpoints as they are found: no prefix, old buffers, tied weights stored twice."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardkit.authoring.rank_pool import RankPool
from shardkit.convert import merge_destination, merge_shards
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.shards.reader import ShardedCheckpoint
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut
from tests.helpers.split_helpers import split_folder

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def ranks(rank_pool: RankPool) -> RankProcesses:
    return rank_pool.of(2)


def without_prefix(tensors: Tensors) -> Tensors:
    """As the hub's gpt2: saved from the base model, its causal masks with it."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(64, 64).tril().bool()[None, None]
    return bare | {f"h.{i}.attn.bias": mask.clone() for i in (0, 1)}


def with_old_buffers(tensors: Tensors) -> Tensors:
    """As GPT-NeoX checkpoints of 2022: masks and rotary frequencies stored."""
    for i in (0, 1):
        at = f"gpt_neox.layers.{i}.attention."
        tensors[at + "bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        tensors[at + "masked_bias"] = torch.tensor(-1e9)
        tensors[at + "rotary_emb.inv_freq"] = torch.ones(4)
    return tensors


def with_both_ends(tensors: Tensors) -> Tensors:
    """Tied weights stored twice."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def with_position_ids(tensors: Tensors) -> Tensors:
    """As MiniLM: an integer buffer, and the names of the base model."""
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    return bare | {"embeddings.position_ids": torch.arange(64)[None]}


FOUND: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "no prefix, masks stored": ("gpt2", without_prefix),
    "old buffers": ("gpt_neox", with_old_buffers),
    "tied weights stored twice": ("llama-biases-tied", with_both_ends),
    "integer buffer": ("bert-base", with_position_ids),
}


@pytest.mark.parametrize("kind", FOUND)
def test_it_is_split_run_and_merged_bit_for_bit(
    kind: str, ranks: RankProcesses, tmp_path: Path
) -> None:
    name, change = FOUND[kind]
    source = make(name, tmp_path / "source")
    save_file(change(load_file(source / "model.safetensors")), source / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    manifest = cut(source, tmp_path / "shards", 2)
    check = check_numerics(tmp_path / "shards", manifest, source, ShardedModel(ranks))
    assert check.verdict == "passed", check
    with ShardedCheckpoint(tmp_path / "shards") as shards:
        merge_shards(shards, merge_destination(shards.manifest, tmp_path / "merged"))
    names = ["model.safetensors", "config.json"]
    for file in names:
        assert (tmp_path / "merged" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers is 3, but .* no tensor of .model.layers.2"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers is 1, but there are tensors of .*layers.1"),
        (
            {"attention_bias": True},
            r"layers.0.self_attn.k_proj.bias.*needs it, and no shard holds it",
        ),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(
    change: dict[str, object], message: str, ranks: RankProcesses, tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    split_folder(source, tmp_path / "shards", 2)  # opens it unchecked
    with pytest.raises(Exception, match=message):
        ShardedModel(ranks).load(tmp_path / "shards", None)
