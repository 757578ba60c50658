"""Proves for every recipe that requests share a batch rightly, and stores the results."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardkit.authoring.batching_check import prove_batching
from shardkit.authoring.batching_results import (
    BatchingResult,
    read_batching_results,
    write_batching_results,
)
from shardkit.authoring.check import SCRATCH
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, find_samples, make_sample
from shardkit.authoring.sweep import (
    PAGE,
    digest_inputs,
    list_alone,
    list_stale,
    read_results,
    render_page,
)
from shardkit.recipe import Recipe

BATCH_TP_SIZES = (2, 3, 4)


def sweep_batching(
    recipes: Sequence[Recipe], folder: Path, only_stale: bool = False
) -> Iterator[tuple[Recipe, BatchingResult]]:
    """Prove every recipe that stands by itself, and store each result as it is done.

    Args:
        recipes: All recipes.
        folder: Where the results are stored.
        only_stale: Whether to leave out those whose results are up to date.
    """
    results, alone = read_batching_results(folder), list_alone(recipes)
    with RankPool() as pool:
        for recipe in list_stale(results, alone) if only_stale else alone:
            proofs = [p for s in find_samples(recipe) for p in _prove_sample(recipe, s, pool)]
            result = BatchingResult(digest_inputs(recipe), proofs)
            results[recipe.name] = result
            kept = {each.name: results[each.name] for each in alone if each.name in results}
            write_batching_results(folder, kept)
            yield recipe, result
    (folder / PAGE).write_text(render_page(read_results(folder), recipes, folder))


def _prove_sample(recipe: Recipe, sample: Sample, pool: RankPool) -> Iterator[dict[str, Any]]:
    """A proof over each number of ranks; one alone if the sequences cannot join."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        source = make_sample(sample, Path(folder) / "source")
        for size in BATCH_TP_SIZES:
            scratch = Path(folder) / f"tp{size}"
            scratch.mkdir()
            proof = prove_batching(source, recipe, pool.of(size), scratch)
            yield {"sample": sample.name, **asdict(proof)}
            if proof.obstacle:
                return
