"""Verifies every sample whole and by blocks: do both come to the same verdict?"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardkit.authoring.block_agreement import Agreement, compare_verdicts
from shardkit.authoring.block_results import BLOCK_RESULTS
from shardkit.authoring.check import SCRATCH
from shardkit.authoring.column_sweep import ColumnSweep
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, make_sample
from shardkit.recipe import Recipe

TP_SIZE = 2


def compare_sample_verdicts(
    recipe: Recipe, sample: Sample, pool: RankPool
) -> Iterator[dict[str, Any]]:
    """A comparison of the clean shards, and of the shards with each fault."""
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


BLOCK_SWEEP = ColumnSweep(BLOCK_RESULTS, compare_sample_verdicts)
