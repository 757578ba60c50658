"""Every sample of every family: proven at tp 2 and 4 against the unsharded model."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardkit.authoring.proof import prove_recipe
from shardkit.authoring.rank_pool import RankPool
from shardkit.recipe import compose_recipe
from shardkit.recipe.catalog import find_recipe, find_recipe_folder, list_recipe_files
from shardkit.recipe.parse import load_recipe
from tests.helpers.model_samples import VARIANTS, SampleFolder, make
from tests.helpers.recipe_words import choose_covering, list_words

BEAMS = 3
RESULTS = find_recipe_folder() / "proofs" / "results.json"
# Rules that no sample of the recipe's own has tensors for, by the end of their names.
ELSEWHERE = {
    "moe": "mlp.experts.{gate_up,down}_proj: in samples of what composes it",
    "minimax_m3": "block_sparse_moe and mlp: published names, which transformers does not write",
    "yoso": "self.conv: of a config that no sample has",
}
NEVER_IN_SAMPLES = ("ignore", "vocab", "replicate", "add_once")  # what only some checkpoints store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleFolder:
    folder = tmp_path_factory.mktemp("families")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else make(name, path)

    return get


def list_quick_samples() -> set[str]:
    """The first sample of a few recipes: they use every word of the recipe format between them."""
    results = json.loads(RESULTS.read_text())
    first = {name: entry["proofs"][0]["sample"] for name, entry in results.items()}
    recipes = map(load_recipe, list_recipe_files())
    words = {each.name: list_words(each) for each in recipes if each.name in first}
    return {first[name] for name in choose_covering(words)}


def cases() -> Iterator[Any]:
    """Every sample over 2 and 4 ranks.

    Every run proves those of a few recipes, and one of each file of samples. The others are proven
    by `make slow`, and when a recipe or its samples change: their published proofs are stale then.
    """
    quick = list_quick_samples()
    groups = {VARIANTS[name].group for name in quick if name in VARIANTS}
    for sample in VARIANTS.values():
        is_quick = sample.name in quick or sample.group not in groups
        groups.add(sample.group)
        usual = 4 if "awkward" in sample.group else 2
        for tp_size in (2, 4):
            marks = () if is_quick and tp_size == usual else pytest.mark.slow
            yield pytest.param(sample.name, tp_size, marks=marks, id=f"{sample.name}-tp{tp_size}")


@pytest.mark.parametrize(("name", "tp_size"), list(cases()))
def test_a_recipe_is_proven_on_its_sample(
    name: str, tp_size: int, rank_pool: RankPool, source: SampleFolder, tmp_path: Path
) -> None:
    whole = source(name)
    recipe = find_recipe(json.loads((whole / "config.json").read_text()))
    proof = prove_recipe(whole, recipe, rank_pool.of(tp_size), tmp_path, BEAMS, with_plan=True)
    assert proof.passed, proof.checks[-1]


@pytest.mark.slow
def test_every_rule_of_every_recipe_is_used_by_some_sample(source: SampleFolder) -> None:
    from shardkit.checkpoint import open_checkpoint

    used: dict[str, set[str]] = defaultdict(set)
    for name in VARIANTS:
        with open_checkpoint(str(source(name))) as checkpoint:
            recipe = compose_recipe(find_recipe(checkpoint.config), checkpoint.config)
            rules = {recipe.rule_for(spec.name).stated_pattern for spec in checkpoint.specs()}
            used[recipe.name].update(rules)
    for path in list_recipe_files():
        if (recipe := load_recipe(path)).part_only:
            continue  # its rules count under other names
        needed = {r.pattern for r in recipe.rules if r.style.name not in NEVER_IN_SAMPLES}
        assert (needed <= used[recipe.name]) == (recipe.name not in ELSEWHERE), recipe.name
