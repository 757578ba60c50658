"""Every sample of every family: proven at tp 2 and 4 against the unsharded model."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from families import VARIANTS, make

from shardkit.catalog import bundled, find_recipe
from shardkit.recipe_file import load_recipe
from shardkit.runtime.ranks import Ranks
from shardkit.verify.proof import prove

BEAMS = 3
NEVER_IN_SAMPLES = ("ignore", "vocab", "replicate", "once")  # what only some checkpoints store


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest):
    with Ranks(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("families")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else make(name, path)

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recipe_is_proven_on_its_sample(name: str, ranks: Ranks, source, tmp_path: Path) -> None:
    whole = source(name)
    recipe = find_recipe(json.loads((whole / "config.json").read_text()))
    proof = prove(whole, recipe, ranks, tmp_path, BEAMS)
    assert proof.passed, proof.checks[-1]


def test_every_rule_of_every_recipe_is_used_by_some_sample(source) -> None:
    from shardkit.checkpoint import open_checkpoint

    used: dict[str, set[str]] = defaultdict(set)
    for name in VARIANTS:
        with open_checkpoint(str(source(name))) as checkpoint:
            recipe = find_recipe(checkpoint.config)
            rules = {recipe.rule_for(spec.name).pattern for spec in checkpoint.specs()}
            used[recipe.name].update(rules)
    for path in bundled():
        recipe = load_recipe(path)
        needed = {r.pattern for r in recipe.rules if r.style not in NEVER_IN_SAMPLES}
        assert needed <= used[recipe.name], recipe.name
