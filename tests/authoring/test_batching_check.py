"""Sequences that share a batch over ranks; `recipes/proofs/FAMILIES.md` has all that is proven."""

from pathlib import Path
from typing import Any

import pytest

from shardkit.authoring.batching_check import prove_batching
from shardkit.authoring.batching_results import BATCHING_RESULTS, BatchingResult
from shardkit.authoring.batching_sweep import BATCH_TP_SIZES
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import list_samples, make_sample
from shardkit.authoring.sweep import list_stale
from shardkit.recipe import find_recipe
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.runtime.engine.scheduler import apply_choices
from shardkit.runtime.engine.sequence import TokenSequence

PROOFS = Path(__file__).resolve().parents[2] / "recipes" / "proofs"
SAMPLES = {sample.name: sample for sample in list_samples()}


def prove(name: str, ranks: RankPool, folder: Path) -> tuple[str, str, str]:
    source = make_sample(SAMPLES[name], folder / "source")
    (folder / "split").mkdir()
    recipe = find_recipe(SAMPLES[name].stored_config)
    proof = prove_batching(source, recipe, ranks.of(2), folder / "split")
    return proof.obstacle, proof.dtype, proof.fault


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_sequences_that_share_a_batch_are_those_of_generate(
    name: str, rank_pool: RankPool, tmp_path: Path
) -> None:
    assert prove(name, rank_pool, tmp_path) == ("", "float32", "")


def test_a_model_that_cannot_join_says_why(rank_pool: RankPool, tmp_path: Path) -> None:
    assert prove("t5", rank_pool, tmp_path) == ("it has an encoder", "", "")


def test_a_sequence_that_gets_the_token_of_another_is_found_out(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply_wrongly(running: list[TokenSequence], choices: dict[str, Any]) -> None:
        names = [str(each.number) for each in running]
        apply_choices(running, dict(zip(names, [choices[n] for n in reversed(names)], strict=True)))

    monkeypatch.setattr("shardkit.runtime.engine.request_loop.apply_choices", apply_wrongly)
    obstacle, dtype, fault = prove("gpt2", rank_pool, tmp_path)
    assert (obstacle, dtype) == ("", "float64")
    assert fault.startswith("after [")


def test_every_recipe_that_shares_a_batch_has_been_proven_as_it_is() -> None:
    recipes = [load_recipe(path) for path in list_recipe_files()]
    results = BATCHING_RESULTS.read(PROOFS)
    stale = [recipe.name for recipe in list_stale(results, recipes)]
    assert not stale, "run `shardkit recipes check --batching --write --stale`"
    assert [fault for result in results.values() for fault in result.faults] == []
    sizes = {
        name: {proof["tp_size"] for proof in result.proofs if not proof["obstacle"]}
        for name, result in results.items()
    }
    lacking = {name for name, found in sizes.items() if found and found != set(BATCH_TP_SIZES)}
    assert lacking == set()


def test_a_summary_says_how_many_can_join_or_why_none_can() -> None:
    proofs = [
        {"sample": name, "obstacle": obstacle, "fault": ""}
        for name, obstacle in (("a", ""), ("b", "no cache"), ("c", "no cache"))
    ]
    assert BatchingResult("", proofs).summary == "1 of 3"
    assert BatchingResult("", proofs[1:]).summary == "no cache"
