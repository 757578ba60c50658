"""Block by block, ranks in turns: clean models pass, each injected fault is named."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.cache_utils import DynamicLayer

from shardkit.authoring import samples
from shardkit.authoring.expert_faults import group_stacks, plan_whole_experts, rotate_experts
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import make_sample
from shardkit.checkpoint import read_config
from shardkit.errors import CheckpointError, ManifestError
from shardkit.layout import spans as layout
from shardkit.recipe import find_recipe
from shardkit.shards.manifest import Manifest
from shardkit.verification import Check
from shardkit.verification.block_check import check_blocks
from shardkit.verification.block_record import round_values
from shardkit.verification.block_runs import TurnRanks
from shardkit.verification.blocks import (
    BlockCall,
    list_float_tensors,
    list_model_blocks,
    visit_blocks,
)
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from shardkit.verification.rank_choice import check_on_ranks
from tests.helpers.layout_faults import LAYOUT_FAULTS, SEQUENTIAL_SUMS_JOINED
from tests.helpers.model_samples import VARIANTS, make
from tests.helpers.runtime_helpers import altered, cut


@dataclass(frozen=True)
class Split:
    """A sample's checkpoint and its shards."""

    source: Path
    shards: Path
    manifest: Manifest

    def check(self, dtype: torch.dtype | None = None) -> Check:
        return check_blocks(self.shards, self.manifest, self.source, dtype)


def split_sample(
    name: str, folder: Path, tp_size: int, dtype: str = "float32", *changes: tuple[str, str]
) -> Split:
    source = make(name, folder / "source", dtype)
    recipe = altered(name, folder, *changes) if changes else None
    return Split(source, folder / "shards", cut(source, folder / "shards", tp_size, recipe))


CLEAN = ("llama", "gpt2", "bert", "t5", "mixtral", "bamba", "clip", "mllama", "albert", "lstm",
         "deepseek_v2", "llava")  # fmt: skip
# In 16 bits the same shards are run in float32, too: that alone is left to the slow tests.
BOTH_DTYPES = [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_a_right_split_passes(name: str, dtype: str, tmp_path: Path) -> None:
    found = split_sample(name, tmp_path, 2, dtype).check()
    assert found.verdict == "passed", found.faults
    assert found.numbers["ranks"] == "turns"


WHOLE_EXPERTS = (
    ("mixtral", 3),  # stacked in memory
    ("gpt_oss", 2),  # stacked on disk
    ("nllb-moe", 2),  # a module each
    ("jetmoe", 2),  # rows in the order of experts
    ("longcat_flash", 3),  # a rank without any
)


@pytest.mark.parametrize(("name", "tp_size"), WHOLE_EXPERTS)
def test_ranks_that_have_whole_experts_pass(name: str, tp_size: int, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source", "float16")
    manifest = cut(source, tmp_path / "shards", tp_size, expert_parallel=True)
    assert manifest.mesh.ep_size == tp_size
    found = Split(source, tmp_path / "shards", manifest).check()
    assert found.verdict == "passed", found.faults


@pytest.mark.parametrize("name", ["deepseek_v3", "switch_transformers"])
def test_experts_on_other_ranks_are_found_in_turns(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source")
    plan = plan_whole_experts(source, find_recipe(read_config(source)), 2)
    assert plan is not None
    rotate_experts(source, group_stacks(plan), tmp_path / "rotated")
    manifest = cut(tmp_path / "rotated", tmp_path / "shards", 2, expert_parallel=True)
    found = Split(source, tmp_path / "shards", manifest).check()
    assert found.verdict == "failed"
    assert ".mlp" in found.faults[1]


WIDE = {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 128}  # fmt: skip


@pytest.mark.parametrize("name", [*BOTH_DTYPES, pytest.param("float16", marks=pytest.mark.slow)])
def test_sixteen_ranks_run_in_one_process(name: str, tmp_path: Path) -> None:
    llama = VARIANTS["llama"]
    sample = replace(llama, config={**llama.config, **WIDE})
    source = make_sample(sample, tmp_path / "source", getattr(torch, name))
    manifest = cut(source, tmp_path / "shards", 16)
    found = Split(source, tmp_path / "shards", manifest).check()
    assert found.verdict == "passed", found.faults
    assert found.numbers["cached_steps"] == "equal"


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
@pytest.mark.parametrize("dtype", ["float16", *BOTH_DTYPES[:1]])
def test_a_wrong_layout_is_named_by_block_module_and_tensor(
    fault: str, dtype: str, tmp_path: Path
) -> None:
    name, right, wrong, module, tensor = LAYOUT_FAULTS[fault]
    found = split_sample(name, tmp_path, 2, dtype, (right, wrong)).check()
    assert found.verdict == "failed"
    block = module.rsplit(".", 2)[0]
    assert found.faults[0].startswith(f"{block}, on rank ")
    assert f"first diverging module: {module}" in found.faults[1]
    assert tensor in found.faults[1]


def test_sums_made_together_of_what_a_model_does_not_just_add_fail(tmp_path: Path) -> None:
    check = split_sample("llama", tmp_path, 2, "float32", SEQUENTIAL_SUMS_JOINED).check()
    assert check.verdict == "failed"
    assert check.faults[0].startswith("model.layers.0, on rank ")
    assert "`joint_sums` add up what the model does not just add" in check.faults[1]


HEAD_VECTOR = (
    '"model.layers.*.mamba.{A_log,D,dt_bias}" = "mamba_heads"',
    """"model.layers.*.mamba.{A_log,D}" = "mamba_heads"
"model.layers.*.mamba.dt_bias" = "2 ffn\"""",
)


def test_a_head_vector_cut_by_the_wrong_unit_of_a_mixture_in_16_bits_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_pool: RankPool
) -> None:
    """What 16 bits allow hides it from a comparison of outputs, even of decoded ones."""
    monkeypatch.setattr(samples, "WEIGHT_SEED", 101)
    monkeypatch.setattr(samples, "NOISE_SEED", 201)
    split = split_sample("granitemoehybrid", tmp_path, 2, "float16", HEAD_VECTOR)
    ranks = rank_pool.of(2)
    outputs = check_numerics(split.shards, split.manifest, split.source, ShardedModel(ranks))
    assert outputs.verdict == "passed"
    for found in (
        split.check(),
        check_on_ranks(split.shards, split.manifest, split.source, None, ranks),
    ):
        assert found.verdict == "failed"
        assert found.faults[0].startswith("model.layers.0, on rank 0 in float32")
        assert "first diverging module: model.layers.0.mamba.out_proj" in found.faults[1]
        assert "model.layers.0.mamba.dt_bias (column)" in found.faults[1]


def test_rotated_kv_replicas_are_found_on_their_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layout.held_units

    def rotated(section: layout.Section, tp_rank: int, tp_size: int) -> Any:
        if section.shared_by and tp_size == 4:
            return right(section, (tp_rank + 1) % tp_size, tp_size)
        return right(section, tp_rank, tp_size)

    with monkeypatch.context() as wrong:
        wrong.setattr(layout, "held_units", rotated)
        split = split_sample("llama-two-kv-heads", tmp_path, 4)
    found = split.check()
    assert found.verdict == "failed"
    assert "module: model.layers.0.self_attn.k_proj, on rank 1" in found.faults[1]


def test_a_cache_in_a_wrong_layout_is_found_in_cached_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in the cache that are another head's: right while the prompt is computed."""
    split = split_sample("llama-two-kv-heads", tmp_path, 4, "bfloat16")
    assert split.check().numbers["cached_steps"] == "equal"
    runs_ranks = False
    update, run = DynamicLayer.update, TurnRanks.run

    def swap_sequences(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        if runs_ranks and keys.shape[-2] == 1:
            self.keys = self.keys.flip(0)
        return update(self, keys, values, *args, **kwargs)

    def run_with_fault(self: TurnRanks, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs_ranks
        runs_ranks = True
        try:
            return run(self, *args, **kwargs)
        finally:
            runs_ranks = False

    monkeypatch.setattr(DynamicLayer, "update", swap_sequences)
    monkeypatch.setattr(TurnRanks, "run", run_with_fault)
    found = split.check()
    assert found.verdict == "failed"
    assert found.numbers["cached_steps"] == "differ"
    assert found.faults[0].startswith("cached decoding, model.layers.0, call 2")


def test_a_rank_without_its_file_ends_the_check(tmp_path: Path) -> None:
    split = split_sample("llama", tmp_path, 2)
    (split.shards / split.manifest.ranks[1].name).unlink()
    with pytest.raises(ManifestError, match="rank-00001"):
        split.check()


def test_a_tensor_that_the_source_lacks_is_named(tmp_path: Path) -> None:
    split = split_sample("llama", tmp_path, 2)
    tensors = load_file(split.source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, split.source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in the checkpoint"):
        split.check()


def test_a_model_has_blocks_of_its_outermost_lists_and_pieces() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)
            nothing_calls = nn.ModuleList([nn.Linear(2, 2)])
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nothing_calls])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower()
            self.head = nn.Sequential(nn.Linear(2, 3))

    names = ["tower.embed", "tower.layers.0", "tower.layers.1.0", "head"]
    assert list_model_blocks(Model()) == names


def test_outputs_are_replaced_wherever_they_are_nested() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, {"a": [x + 1], "ids": torch.tensor([1])}

    model = nn.Sequential(Inner())
    calls = []

    def visit(call: BlockCall, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        calls.append((str(call), len(tensors)))
        return [None, tensors[1] * 10] if call.block else [None, None]

    with visit_blocks(model, ["0"], visit):
        first, rest = model(torch.zeros(1))
        model(torch.zeros(1))
    assert (first.item(), rest["a"][0].item(), rest["ids"].item()) == (0.0, 10.0, 1)
    assert calls[:2] == [("0", 2), ("the model's output", 2)]
    assert calls[2:] == [("0, call 2", 2), ("the model's output, call 2", 2)]
    assert len(list_float_tensors(rest)) == 1


def test_rounded_values_stay_finite() -> None:
    values = torch.tensor([1e9, -1e9, 1.0001, torch.inf], dtype=torch.float64)
    assert round_values(values, torch.float16).tolist() == [65504.0, -65504.0, 1.0, torch.inf]


def test_a_rank_whose_output_cannot_be_compared_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that returns the logits of fewer tokens: of another shape, at the model's output."""
    split, prepare_rank = split_sample("llama", tmp_path, 2), TurnRanks._prepare

    def prepare(self: TurnRanks, shard: Any, reader: Any) -> Any:
        streamed = prepare_rank(self, shard, reader)
        if shard.rank.index == 1:
            streamed.model.register_forward_hook(drop_token)
        return streamed

    def drop_token(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output["logits"] = output["logits"][:, 1:]
        return output

    monkeypatch.setattr(TurnRanks, "_prepare", prepare)
    check = split.check()
    assert check.verdict == "failed"
    assert check.faults == (
        "the model's output: rank 1 has no output of the reference's shape to compare",
    )
