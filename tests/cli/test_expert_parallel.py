"""`--expert-parallel`: what the commands say of whole experts, at a real mixture's size too."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from shardkit.cli import main
from tests.helpers.fixture_checkpoints import sparse_checkpoint
from tests.helpers.real_inputs import shared
from tests.helpers.synthetic_checkpoints import (
    llama,
    llama_config,
    specs_of,
    write_source,
)
from tests.planning.test_experts import MIXTRAL, list_mixtral


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_mixture_of_140b_has_an_expert_on_each_rank(tmp_path: Path) -> None:
    fixture = shared("fixtures/mixtral-8x22b-wizardlm2")
    folder = sparse_checkpoint(fixture, tmp_path / "mixtral")
    shared_experts, whole = (
        json.loads(run("plan", folder, "--tp", 8, "--json", *more))
        for more in ((), ("--expert-parallel",))
    )
    assert (shared_experts["expert_parallel"], whole["expert_parallel"]) == (False, True)
    assert shared_experts["collectives"] == whole["collectives"]
    assert [r["bytes"] for r in shared_experts["ranks"]] == [r["bytes"] for r in whole["ranks"]]
    groups = [group for group in whole["groups"] if group["style"] == "expert"]
    assert [(g["treatment"], g["count"], g["dim"]) for g in groups] == [("whole", 448, None)] * 3
    assert whole["possible_tp"]["largest"] == 8


def make_mixture(folder: Path) -> Path:
    config: dict[str, Any] = {**MIXTRAL, "vocab_size": 40}
    names = list_mixtral()
    norms = {
        "model.norm.weight": (32,),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.self_attn.k_proj.weight": (16, 32),
        "model.layers.0.self_attn.v_proj.weight": (16, 32),
    }
    return write_source(folder, config, specs_of(names | norms))


def test_a_split_a_merge_and_a_reshard_keep_experts_whole(tmp_path: Path) -> None:
    source, out = make_mixture(tmp_path / "mixture"), tmp_path / "out"
    assert "Whole experts on a rank" in run("plan", source, "--tp", 3, "--expert-parallel")
    text = run("split", source, out, "--tp", 3, "--expert-parallel")
    assert "experts.{0..4}" in text
    assert "(5 experts over 3 ranks)" in text
    assert f"{out}: shards for 3 ranks with whole experts, by" in run("inspect", out)
    run("reshard", out, tmp_path / "two", "--tp", 2)
    run("split", source, tmp_path / "direct", "--tp", 2, "--expert-parallel")
    for name in ("rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    run("merge", tmp_path / "two", tmp_path / "merged")
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def test_a_dense_model_is_refused_in_a_line(tmp_path: Path) -> None:
    source = write_source(tmp_path / "llama", llama_config(), specs_of(llama()))
    result = CliRunner().invoke(
        main, ["split", str(source), str(tmp_path / "out"), "--tp", "2", "--expert-parallel"]
    )
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: no tensor is of an expert that recipe 'llama' can place whole on a rank; split"
        " without --expert-parallel\n"
    )
    assert not (tmp_path / "out").exists()
