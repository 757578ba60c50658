"""`shardkit recipes`: what there is, one recipe's text, its proof, and errors planted in it."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit.authoring.check import make_models, try_recipe
from shardkit.authoring.mutations import mutants
from shardkit.authoring.rank_pool import RankPool
from shardkit.recipe.catalog import find_recipe_folder, list_recipe_files
from shardkit.recipe.parse import load_recipe
from tests.helpers.command_line import run
from tests.helpers.runtime_helpers import altered


def test_the_list_names_every_recipe_and_why_what_is_large_stays_whole() -> None:
    listed = json.loads(run("recipes", "list", "--json").stdout)
    assert [entry["recipe"] for entry in listed] == [path.stem for path in list_recipe_files()]
    rwkv = next(entry for entry in listed if entry["recipe"] == "rwkv")
    assert rwkv["whole"]
    text = run("recipes", "list").stdout
    for pattern, reason in rwkv["whole"].items():
        assert f"{pattern}: {reason}" in text


def test_show_prints_the_file_as_it_is() -> None:
    assert run("recipes", "show", "gpt2").stdout == (find_recipe_folder() / "gpt2.toml").read_text()
    missing = run("recipes", "show", "none-such")
    assert missing.exit_code == 1
    assert "shardkit recipes list" in missing.stderr


def test_a_recipe_is_checked_and_errors_planted_in_it_are_caught() -> None:
    result = run("recipes", "check", "mpt", "--mutants", "8", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"]) == (0, True)
    assert all(trial["passed"] for trial in found["trials"])
    kinds = {entry["fault"] for entry in found["mutants"] if entry["caught"]}
    assert {"layout swapped", "rule left out"} <= kinds
    assert len(found["mutants"]) == 8


def test_a_wrong_recipe_fails_its_check_and_says_where(tmp_path: Path) -> None:
    altered("gpt2", tmp_path, ('"3 heads"', '"heads 3"'))
    result = run("recipes", "check", str(tmp_path / "gpt2.toml"))
    assert result.exit_code == 4
    assert "masked sum" in result.stdout
    assert "misses its sum" in result.stdout


def test_a_recipe_is_checked_on_a_config_of_ones_own(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 3,
        "n_embd": 24, "vocab_size": 31, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("recipes", "check", "gpt2", "--config", str(tmp_path)).exit_code == 0
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 24000}))
    refused = run("recipes", "check", "gpt2", "--config", str(tmp_path))
    assert refused.exit_code == 1
    assert "fewer layers and smaller widths" in refused.stderr


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as started:
        yield started


def test_a_bias_that_every_rank_adds_and_an_argument_not_cut_are_among_the_mutants() -> None:
    bloom = load_recipe(find_recipe_folder() / "bloom.toml")
    rules = {rule.pattern: frozenset({rule.pattern + ".bias"}) for rule in bloom.rules}
    faults = [mutant.fault for mutant in mutants(bloom, rules)]
    assert {"bias added by every rank", "argument alibi not cut"} <= set(faults)
    assert len(set(faults[:4])) == 4, "the first of each kind come first"


def test_ranks_that_a_mutant_has_stopped_do_not_make_the_next_one_fail(
    pool: RankPool, tmp_path: Path
) -> None:
    recipe = load_recipe(find_recipe_folder() / "gpt2.toml")
    models = make_models(recipe, None, tmp_path)
    name = next(iter(models))
    (first,) = try_recipe(recipe, {name: models[name]}, (2,), pool)
    os.kill(pool.of(2).pids[0], signal.SIGKILL)
    (broken,) = try_recipe(recipe, {name: models[name]}, (2,), pool)
    (again,) = try_recipe(recipe, {name: models[name]}, (2,), pool)
    assert [first.proof.passed, broken.proof.passed, again.proof.passed] == [True, False, True]
