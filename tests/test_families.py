"""Every family variant, split and run over real ranks, against the unsharded model in float64."""

from pathlib import Path

import pytest
from families import VARIANTS, make
from harness import cut

from shardkit.runtime.ranks import Ranks
from shardkit.shards import ShardedCheckpoint
from shardkit.split import merge
from shardkit.verify.models import LocalRanks
from shardkit.verify.numerics import check_numerics

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest):
    with Ranks(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("families")

    def get(name: str, dtype: str) -> Path:
        path = folder / f"{name}-{dtype}"
        return path if path.exists() else make(name, path, dtype)

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_shards_compute_what_the_unsharded_model_does(
    name: str, dtype: str, ranks: Ranks, source, tmp_path: Path
) -> None:
    whole = source(name, dtype)
    manifest = cut(whole, tmp_path / "shards", ranks.size)
    check = check_numerics(tmp_path / "shards", manifest, whole, LocalRanks(ranks))
    assert check.verdict == "passed", check
    assert check.numbers["dtype"] == dtype
    if dtype == "float32":
        assert check.numbers.get("greedy", "equal") == "equal"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_merging_gives_back_the_file_transformers_wrote(
    name: str, dtype: str, source, tmp_path: Path
) -> None:
    whole = source(name, dtype)
    cut(whole, tmp_path / "shards", 4)
    with ShardedCheckpoint(tmp_path / "shards") as shards:
        merge(shards, tmp_path / "merged")
    file = "model.safetensors"
    assert (tmp_path / "merged" / file).read_bytes() == (whole / file).read_bytes()


def test_every_rule_of_every_recipe_is_used_by_some_variant(source) -> None:
    from shardkit.checkpoint import open_checkpoint
    from shardkit.recipe_file import bundled, find_recipe, load_recipe

    used: dict[str, set[str]] = {}
    for name in VARIANTS:
        with open_checkpoint(str(source(name, "float32"))) as checkpoint:
            recipe = find_recipe(checkpoint.model_type)
            rules = {recipe.rule_for(spec.name).pattern for spec in checkpoint.specs()}
            used.setdefault(recipe.name, set()).update(rules)
    for path in bundled():
        recipe = load_recipe(path)
        column_and_row = {r.pattern for r in recipe.rules if r.style in ("column", "row")}
        assert column_and_row <= used[recipe.name], recipe.name
