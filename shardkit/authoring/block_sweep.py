"""Verifies every sample whole and by blocks, and stores whether both say the same."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardkit.authoring.block_agreement import Agreement, compare_verdicts
from shardkit.authoring.block_results import (
    BlockResult,
    read_block_results,
    write_block_results,
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

TP_SIZE = 2


def sweep_blocks(
    recipes: Sequence[Recipe], folder: Path, only_stale: bool = False
) -> Iterator[tuple[Recipe, BlockResult]]:
    """Compare the verdicts on every recipe that stands by itself; store each result as it is done.

    Args:
        recipes: All recipes.
        folder: Where the results are stored.
        only_stale: Whether to leave out those whose results are up to date.
    """
    results, alone = read_block_results(folder), list_alone(recipes)
    with RankPool() as pool:
        for recipe in list_stale(results, alone) if only_stale else alone:
            samples = find_samples(recipe)
            comparisons = [entry for s in samples for entry in _compare_sample(recipe, s, pool)]
            results[recipe.name] = result = BlockResult(digest_inputs(recipe), comparisons)
            kept = {each.name: results[each.name] for each in alone if each.name in results}
            write_block_results(folder, kept)
            yield recipe, result
    (folder / PAGE).write_text(render_page(read_results(folder), recipes, folder))


def _compare_sample(recipe: Recipe, sample: Sample, pool: RankPool) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        source = make_sample(sample, Path(folder) / sample.name)
        for agreement in compare_verdicts(source, recipe, TP_SIZE, pool, Path(folder)):
            if sample.limitation and agreement.is_stricter:  # outputs are only known to be near
                agreement = replace(agreement, is_unseen=True)
            yield _to_json(sample, agreement)


def _to_json(sample: Sample, agreement: Agreement) -> dict[str, Any]:
    """What is kept of a comparison: of the tensors to blame the first."""
    return {
        "sample": sample.name,
        "fault": agreement.fault,
        "pattern": agreement.pattern,
        "verdict": agreement.whole.verdict,
        "blamed": agreement.whole.tensors.partition(" ")[0],
        "difference": agreement.difference,
        **({"unseen": True} if agreement.is_unseen else {}),
    }
