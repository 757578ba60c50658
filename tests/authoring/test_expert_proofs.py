"""Whole experts on each rank, proven over real ranks: each way in which models run experts."""

import json
from pathlib import Path

import pytest

from shardkit.authoring.check import run_expert_faults
from shardkit.authoring.proof import prove_recipe
from shardkit.authoring.rank_pool import RankPool
from shardkit.recipe import find_recipe
from shardkit.recipe.catalog import find_recipe_folder, list_recipe_files
from shardkit.recipe.parse import load_recipe
from tests.helpers.model_samples import make

RESULTS = find_recipe_folder() / "proofs" / "results.json"


@pytest.mark.parametrize(
    ("sample", "tp_size"),
    [
        ("mixtral", 3),  # experts one by one on disk, stacked in memory; 4 over 3 ranks
        ("gpt_oss", 2),  # stacked on disk, with biases
        ("dbrx-6-heads-2-kv", 2),  # stacked in one axis
        pytest.param(
            "nllb-moe", 2, marks=pytest.mark.slow
        ),  # a module for each expert, in an encoder and a decoder
        ("llama4", 2),  # all tokens pass through every expert
        ("jetmoe", 2),  # rows in the order of experts
        ("longcat_flash", 3),  # experts that pass their input through; a rank without others
    ],
)
def test_a_mixture_with_whole_experts_is_what_it_is_unsharded(
    sample: str, tp_size: int, rank_pool: RankPool, tmp_path: Path
) -> None:
    source = make(sample, tmp_path / "source")
    recipe = find_recipe(json.loads((source / "config.json").read_text()))
    proof = prove_recipe(
        source, recipe, rank_pool.of(tp_size), tmp_path, 3, with_plan=True, expert_parallel=True
    )
    assert proof.passed, proof.checks[-1]


@pytest.mark.parametrize("sample", ["deepseek_v3", "switch_transformers"])
def test_rotated_experts_are_detected_by_their_numbers(
    sample: str, rank_pool: RankPool, tmp_path: Path
) -> None:
    source = make(sample, tmp_path / "source")
    recipe = find_recipe(json.loads((source / "config.json").read_text()))
    results = list(run_expert_faults(recipe, [source], 2, rank_pool))
    assert [result.detected_by for result in results] == ["numerics", "numerics"]
    blamed = " ".join(results[0].proof.checks[-1].faults)
    assert "tensors to blame" in blamed
    assert ".mlp.experts" in blamed


def test_every_recipe_that_names_experts_has_proofs_with_whole_ones() -> None:
    results = json.loads(RESULTS.read_text())
    lacking = set()
    for path in list_recipe_files():
        recipe = load_recipe(path)
        names_experts = any(recipe.match_experts(rule.pattern) for rule in recipe.rules)
        if recipe.part_only or not names_experts or recipe.name not in results:
            continue
        proofs = [p for p in results[recipe.name]["proofs"] if p.get("expert_parallel")]
        faults = [m for m in results[recipe.name]["mutants"] if m["fault"] == "experts rotated"]
        assert all(proof["passed"] for proof in proofs), recipe.name
        assert all(fault["detected"] for fault in faults), recipe.name
        if not (proofs and faults):
            lacking.add(recipe.name)
    assert not lacking
