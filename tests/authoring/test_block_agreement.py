"""Verification by blocks and of whole models; `recipes/proofs/FAMILIES.md` has all verdicts."""

from pathlib import Path

import pytest

from shardkit.authoring.block_agreement import Agreement, Opinion, compare_verdicts
from shardkit.authoring.block_results import BLOCK_RESULTS, BlockResult
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import list_samples, make_sample
from shardkit.authoring.sweep import list_stale
from shardkit.recipe import find_recipe
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.verification.report import Check

PROOFS = Path(__file__).resolve().parents[2] / "recipes" / "proofs"
SAMPLES = {sample.name: sample for sample in list_samples()}


def compare(name: str, ranks: RankPool, folder: Path) -> list[Agreement]:
    source = make_sample(SAMPLES[name], folder / name)
    recipe = find_recipe(SAMPLES[name].stored_config)
    return [*compare_verdicts(source, recipe, 2, ranks, folder)]


def test_blocks_say_of_right_and_wrong_shards_what_whole_models_say(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    agreements = compare("mixtral", rank_pool, tmp_path)
    assert not [each.difference for each in agreements if each.difference]
    right, *_, changed, whole_experts, rotated = agreements
    assert [each.whole.verdict for each in (right, whole_experts)] == ["passed", "passed"]
    for wrong in (changed, rotated):
        assert wrong.blocks.verdict == "failed"
        assert ".experts." in wrong.blocks.tensors


def test_blocks_that_miss_what_whole_models_see_are_reported(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shardkit.authoring.block_agreement.check_blocks",
        lambda *_: Check("numerics", "passed", ""),
    )
    right, *_, changed = compare("gpt2", rank_pool, tmp_path)
    assert right.difference == ""
    assert changed.difference.startswith("one tensor changed transformer.h.")
    assert ": failed whole, passed by blocks: " in changed.difference


def test_every_recipe_has_been_verified_both_ways_as_it_is() -> None:
    recipes = [load_recipe(path) for path in list_recipe_files()]
    results = BLOCK_RESULTS.read(PROOFS)
    stale = [recipe.name for recipe in list_stale(results, recipes)]
    assert not stale, "run `shardkit recipes check --blocks --write --stale`"
    assert [text for result in results.values() for text in result.faults] == []


def test_another_tensor_to_blame_is_a_difference() -> None:
    whole, blocks = Opinion("failed", "a (row)"), Opinion("failed", "b (row)")
    assert Agreement("fault", "a", whole, blocks).difference == (
        "fault a: whole models blame a (row); blocks b (row)"
    )
    assert Agreement("fault", "a", Opinion("failed"), blocks).difference == ""


def test_right_shards_that_fail_both_ways_are_a_difference() -> None:
    failed = Opinion("failed", "a (row)", "error 1")
    agreement = Agreement("", "", failed, failed)
    assert agreement.difference == "as it is: error 1"
    entries = [{"sample": "s", "difference": each} for each in ("", agreement.difference)]
    result = BlockResult("", entries)
    assert (result.summary, result.faults) == ("1 of 2", ["s: as it is: error 1"])


def test_what_no_output_shows_is_told_apart() -> None:
    passed, failed = Opinion("passed"), Opinion("failed", "a (row)", "error 1")
    assert Agreement("fault", "a", passed, failed).difference == (
        "fault a: passed whole, failed by blocks: error 1"
    )
    assert Agreement("fault", "a", passed, failed, is_unseen=True).difference == ""
    entries = [{"sample": "s", "difference": "", "unseen": each} for each in (True, False)]
    assert BlockResult("", entries).summary == "1 of 2; 1 by blocks alone"
