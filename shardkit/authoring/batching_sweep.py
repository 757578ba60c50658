"""Proves for every recipe that requests share a batch rightly."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardkit.authoring.batching_check import prove_batching
from shardkit.authoring.batching_results import BATCHING_RESULTS
from shardkit.authoring.check import SCRATCH
from shardkit.authoring.column_sweep import ColumnSweep
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, make_sample
from shardkit.recipe import Recipe

BATCH_TP_SIZES = (2, 3, 4)


def prove_sample_batching(
    recipe: Recipe, sample: Sample, pool: RankPool
) -> Iterator[dict[str, Any]]:
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


BATCHING_SWEEP = ColumnSweep(BATCHING_RESULTS, prove_sample_batching)
