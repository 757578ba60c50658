"""`shardkit recipes`: what there is, one recipe's text, its proof, and faults injected into it."""

import json
import os
import signal
from pathlib import Path

import pytest

from shardkit.authoring.check import make_models, prove_on_models
from shardkit.authoring.mutations import list_mutants
from shardkit.authoring.rank_pool import RankPool
from shardkit.recipe.catalog import find_recipe_folder, list_recipe_files
from shardkit.recipe.parse import load_recipe
from tests.helpers.command_line import run
from tests.helpers.runtime_helpers import altered


def test_the_list_names_every_recipe_and_why_what_is_large_stays_whole() -> None:
    listed = json.loads(run("recipes", "list", "--json").stdout)
    assert [entry["recipe"] for entry in listed] == [path.stem for path in list_recipe_files()]
    rwkv = next(entry for entry in listed if entry["recipe"] == "rwkv")
    assert rwkv["replicated"]
    text = run("recipes", "list").stdout
    for pattern, reason in rwkv["replicated"].items():
        assert f"{pattern}: {reason}" in text


def test_show_prints_the_file_as_it_is() -> None:
    assert run("recipes", "show", "gpt2").stdout == (find_recipe_folder() / "gpt2.toml").read_text()
    missing = run("recipes", "show", "none-such")
    assert missing.exit_code == 1
    assert "shardkit recipes list" in missing.stderr


@pytest.mark.usefixtures("recipe_check_ranks")
def test_a_recipe_is_checked_and_faults_injected_into_it_are_detected() -> None:
    result = run("recipes", "check", "mpt", "--mutants", "8", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"]) == (0, True)
    assert all(proof["passed"] for proof in found["proofs"])
    kinds = {entry["fault"] for entry in found["mutants"] if entry["detected"]}
    assert {"layout swapped", "rule left out"} <= kinds
    assert len(found["mutants"]) == 8


@pytest.mark.slow
def test_a_wrong_recipe_fails_its_check_and_says_where(tmp_path: Path) -> None:
    altered("gpt2", tmp_path, ('"3 heads"', '"heads 3"'))
    result = run("recipes", "check", str(tmp_path / "gpt2.toml"))
    assert result.exit_code == 4
    assert "masked sum" in result.stdout
    assert "is off by" in result.stdout


@pytest.mark.usefixtures("recipe_check_ranks")
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


def test_a_bias_that_every_rank_adds_and_an_argument_not_cut_are_among_the_mutants() -> None:
    bloom = load_recipe(find_recipe_folder() / "bloom.toml")
    rules = {rule.pattern: frozenset({rule.pattern + ".bias"}) for rule in bloom.rules}
    faults = [mutant.fault for mutant in list_mutants(bloom, rules)]
    assert {"bias added by every rank", "argument alibi not cut"} <= set(faults)
    assert len(set(faults[:4])) == 4, "the first of each kind come first"


@pytest.mark.slow
def test_ranks_that_a_mutant_has_stopped_do_not_make_the_next_one_fail(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    recipe = load_recipe(find_recipe_folder() / "gpt2.toml")
    models = make_models(recipe, None, tmp_path)
    name = next(iter(models))
    (first,) = prove_on_models(recipe, {name: models[name]}, (2,), rank_pool)
    os.kill(rank_pool.of(2).pids[0], signal.SIGKILL)
    (broken,) = prove_on_models(recipe, {name: models[name]}, (2,), rank_pool)
    (again,) = prove_on_models(recipe, {name: models[name]}, (2,), rank_pool)
    assert [first.proof.passed, broken.proof.passed, again.proof.passed] == [True, False, True]


def test_results_are_written_only_into_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shardkit.authoring.publishing.find_recipe_folder", lambda: tmp_path)
    refused = run("recipes", "check", "gpt2", "--write")
    assert refused.exit_code == 5
    assert "not in a checkout" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    (), ("gpt2", "--all"), ("gpt2", "--stale"), ("gpt2", "--write", "--tp", "2"),
    ("gpt2", "--write", "--json"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_wrong_usage(options: tuple[str, ...]) -> None:
    assert run("recipes", "check", *options).exit_code == 2


def test_only_a_bundled_recipe_has_results_to_write(tmp_path: Path) -> None:
    refused = run("recipes", "check", str(tmp_path / "own.toml"), "--write")
    assert refused.exit_code == 1
    assert "not a bundled recipe" in refused.stderr
