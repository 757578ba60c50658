"""`shardkit plan` over the names and shapes of real models: exact, cheap, and without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.header import read_header
from shardkit.cli import main
from tests.helpers.fixture_checkpoints import small_checkpoint, sparse_checkpoint
from tests.helpers.real_inputs import shared

# From each model's config: layers, local kv heads over 8 ranks, head_dim and bytes per element;
# then the row-parallel weights (attention, MLP) and stacks of experts.
MODELS = {
    "llama-3.1-70b-reflection": (80, 1, 128, 4, 160, 0),
    "mixtral-8x22b-wizardlm2": (56, 1, 128, 2, 56, 56),
    "falcon-40b": (60, 1, 64, 2, 120, 0),
    "gpt-neox-redpajama-incite-7b": (32, 4, 128, 2, 64, 0),
    "bloom-176b": (70, 14, 128, 2, 140, 0),
}
JOINT = "falcon-40b"  # attention and MLP in parallel, as one sum; INCITE has one after the other
TP = 8
IMPORTS = """
import sys
from shardkit.cli import main
main(sys.argv[1:], standalone_mode=False)
heavy = {"torch", "transformers", "numpy", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model's checkpoint folder without its weights."""
    fixture = shared(f"fixtures/{request.param}")
    return sparse_checkpoint(fixture, tmp_path_factory.mktemp(request.param) / request.param)


@pytest.fixture(scope="module")
def planned(model: Path) -> dict[str, Any]:
    """What `plan --json` says of it."""
    planned: dict[str, Any] = run_plan(model, TP)
    return planned


def run_plan(folder: Path, tp_size: int, *more: str) -> Any:
    result = CliRunner().invoke(main, ["plan", str(folder), "--tp", str(tp_size), "--json", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def treatment_of(planned: dict[str, Any], module: str) -> str:
    return next(str(g["treatment"]) for g in planned["groups"] if f".{module}." in g["tensors"])


def test_the_folder_has_the_bytes_the_index_states(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    with Checkpoint(model) as checkpoint:
        masks = [s for s in checkpoint.specs() if s.dtype == "BOOL"]
        total = sum(spec.nbytes for spec in checkpoint.specs())
    # An index counts a bool as one bit; the file has a byte.
    counted_twice = sum(s.nbytes - s.nbytes // 8 for s in masks)
    assert total - counted_twice == index["metadata"]["total_size"]


def test_every_tensor_is_in_one_group(model: Path, planned: dict[str, Any]) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert sum(group["count"] for group in planned["groups"]) == len(index["weight_map"])
    assert planned["tensors"] == len(index["weight_map"])


def test_bytes_of_all_ranks_are_the_total_and_what_is_replicated(
    model: Path, planned: dict[str, Any]
) -> None:
    stored = sum(rank["bytes"] for rank in planned["ranks"])
    assert stored == planned["bytes"] + planned["replicated_bytes"]
    headers = [read_header(path) for path in model.glob("*.safetensors")]
    assert planned["bytes"] == sum(e.stop - e.start for h in headers for e in h.entries)
    copies = {"replicated": TP - 1, "split": 0, "rank 0 only": 0}
    again = [copies[group["treatment"]] * group["rank_bytes"][0] for group in planned["groups"]]
    assert planned["replicated_bytes"] == sum(again)


def test_what_is_kept_for_a_merge_only_is_stored_and_not_loaded(planned: dict[str, Any]) -> None:
    kept = sum(g["rank_bytes"][0] for g in planned["groups"] if g["style"] == "ignore")
    assert (kept > 0) == (planned["model_type"] == "gpt_neox")
    for rank in planned["ranks"]:
        assert rank["bytes"] - rank["loaded_bytes"] == (kept if rank["tp_rank"] == 0 else 0)


def test_ranks_hold_what_their_local_shapes_say(planned: dict[str, Any]) -> None:
    for tp_rank, rank in enumerate(planned["ranks"]):
        assert rank["bytes"] == sum(group["rank_bytes"][tp_rank] for group in planned["groups"])
    for group in planned["groups"]:
        if group["treatment"] == "split":
            along = [shape[group["dim"]] for shape in group["local_shapes"]]
            assert sum(along) == group["shape"][group["dim"]]


def test_kv_cache_is_what_the_attention_keeps(model: Path, planned: dict[str, Any]) -> None:
    layers, kv_heads, head_dim, width, _, _ = MODELS[model.name]
    each = 2 * layers * kv_heads * head_dim * width
    assert planned["kv_cache"]["bytes_per_token_by_rank"] == [each] * TP
    assert planned["kv_cache"]["bytes_per_token"] == each * TP


def test_each_row_parallel_weight_is_one_all_reduce_and_experts_one_a_layer(
    model: Path, planned: dict[str, Any]
) -> None:
    *_, rows, stacks = MODELS[model.name]
    found = planned["collectives"]
    assert (found["row_parallel"], found["expert_stacks"]) == (rows, stacks)
    joint = rows // 2 if model.name == JOINT else 0
    assert (found["joint"], found["all_reduces"]) == (joint, rows + stacks - joint + 1)
    has_logits = json.loads((model / "config.json").read_text())["architectures"] != ["BloomModel"]
    assert (found["all_gathers"], found["output_is_tied"]) == (int(has_logits), False)


def test_the_tensor_that_blocks_more_ranks_is_named(model: Path, planned: dict[str, Any]) -> None:
    possible = planned["possible_tp"]
    assert run_plan(model, possible["largest"])["tp_size"] == possible["largest"]
    command = ["plan", str(model), "--tp", str(possible["largest"] + 1)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {possible['blocked_by']}: ")
    assert f"divides over tp_size 1 to {possible['largest']}" in result.stderr
    assert result.stdout == ""


def test_a_plan_imports_neither_torch_nor_transformers(model: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, "plan", str(model), "--tp", "8"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")  # after its warnings


def test_a_plan_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_checkpoint(tmp_path / "model")

    def refuse(*_: object) -> None:
        raise AssertionError("a plan read weights")

    monkeypatch.setattr(Checkpoint, "read_into", refuse)
    assert run_plan(folder, 2)["tp_size"] == 2


def test_ranks_that_differ_are_shown_as_a_range_and_explained(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model")
    text = CliRunner().invoke(main, ["plan", str(folder), "--tp", "3"]).stdout
    assert "model.layers.{0..1}.self_attn.q_proj.weight  dim 0  [16, 16] -> [4..8, 16] each" in text
    assert "4 heads over 3 ranks" in text or "2 kv_heads shared by 4 over 3 ranks" in text
    assert "63 vocab" not in text  # 21 on each of three ranks


def test_replicated_kv_heads_are_stored_and_cached_by_every_rank_that_uses_them(
    tmp_path: Path,
) -> None:
    folder = small_checkpoint(tmp_path / "model")
    fates = {tp: treatment_of(run_plan(folder, tp), "k_proj") for tp in (2, 4)}
    assert fates == {2: "split", 4: "kv-replicated"}
    # 2 kv heads, but one on each of 4 ranks: 2 (k and v) * 2 layers * 4 wide * 4 bytes, 4 times.
    cache = run_plan(folder, 4)["kv_cache"]
    assert cache["kv_heads_by_rank"] == [1, 1, 1, 1]
    assert cache["bytes_per_token"] == 4 * 2 * 2 * 4 * 4


def test_kv_heads_are_expanded_where_ranks_would_share_them_unevenly(tmp_path: Path) -> None:
    config = {"num_attention_heads": 16, "num_key_value_heads": 8}
    planned = run_plan(small_checkpoint(tmp_path / "model", config), 3)
    assert treatment_of(planned, "k_proj") == "kv-expanded"
    assert planned["kv_cache"]["kv_heads_by_rank"] == [6, 5, 5]
    assert planned["kv_cache"]["head_dim"] == 1


def test_what_the_config_does_not_tell_is_unknown_and_not_guessed(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model", {"mem_len": 8})
    cache = run_plan(folder, 2)["kv_cache"]
    assert cache["bytes_per_token"] is None
    assert cache["reason"].startswith("unknown: config.json has mem_len")


def test_what_copies_of_kv_heads_cost_is_told_with_the_sizes_that_avoid_them(
    tmp_path: Path,
) -> None:
    folder = small_checkpoint(tmp_path / "model")
    assert run_plan(folder, 2)["kv_copies"] is None
    assert run_plan(folder, 4)["kv_copies"] == {
        "kv_heads": 2, "cache_growth": 2.0, "weight_growth": 2.0, "even_tp_sizes": [2],
    }  # fmt: skip
    text = CliRunner().invoke(main, ["plan", str(folder), "--tp", "4"]).stdout
    assert (
        "KV copies    the KV cache is 2.00 times and the weights of kv heads are 2.00 times an even"
        " split's: 2 kv heads do not divide over 4 ranks; tp_size 2 avoids it\n"
    ) in text


def test_one_rank_needs_no_collectives(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model")
    assert run_plan(folder, 1)["collectives"]["all_reduces"] == 0
    assert (
        "none over one rank" in CliRunner().invoke(main, ["plan", str(folder), "--tp", "1"]).stdout
    )


def test_a_trained_encoder_has_no_cache(minilm: Path) -> None:
    planned = run_plan(minilm, 4)
    assert planned["kv_cache"]["reason"] == "none: an encoder keeps no cache"
    assert planned["collectives"]["all_gathers"] == 0
