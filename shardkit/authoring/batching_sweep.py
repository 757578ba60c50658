"""Proves for every recipe that requests share a batch rightly, and stores the results."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardkit.authoring.batching_check import prove_batching
from shardkit.authoring.check import SCRATCH
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, find_samples, make_sample
from shardkit.authoring.sweep import digest_inputs, list_alone
from shardkit.recipe import Recipe

RESULTS = "batching.json"
TP_SIZE = 2
AWKWARD_TP_SIZE = 3  # of samples whose sizes divide unevenly


@dataclass(frozen=True)
class BatchingResult:
    """The results of one recipe, as they are stored.

    Attributes:
        digest: The digest of the recipe and the samples that they are of.
        proofs: A JSON object for each sample.
    """

    digest: str
    proofs: Sequence[Mapping[str, Any]]

    @property
    def faults(self) -> list[str]:
        """What was wrong, by sample."""
        return [f"{proof['sample']}: {proof['fault']}" for proof in self.proofs if proof["fault"]]

    @property
    def obstacles(self) -> list[str]:
        """Why sequences of samples cannot join a batch, each reason once."""
        return list(dict.fromkeys(p["obstacle"] for p in self.proofs if p["obstacle"]))

    @property
    def summary(self) -> str:
        """In a few words: how many of the samples can join, or why none can."""
        joining = sum(not proof["obstacle"] for proof in self.proofs)
        return f"{joining} of {len(self.proofs)}" if joining else "; ".join(self.obstacles)


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
        for recipe in alone:
            stored = results.get(recipe.name)
            if only_stale and stored is not None and stored.digest == digest_inputs(recipe):
                continue
            proofs = [_prove_sample(recipe, sample, pool) for sample in find_samples(recipe)]
            result = BatchingResult(digest_inputs(recipe), proofs)
            results[recipe.name] = result
            kept = {each.name: results[each.name] for each in alone if each.name in results}
            lines = [f"{json.dumps(name)}: {json.dumps(asdict(r))}" for name, r in kept.items()]
            (folder / RESULTS).write_text("{\n" + ",\n".join(lines) + "\n}\n")
            yield recipe, result


def _prove_sample(recipe: Recipe, sample: Sample, pool: RankPool) -> dict[str, Any]:
    size = AWKWARD_TP_SIZE if "awkward" in sample.group else TP_SIZE
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        source = make_sample(sample, Path(folder) / "source")
        scratch = Path(folder) / "split"
        scratch.mkdir()
        proof = asdict(prove_batching(source, recipe, pool.of(size), scratch))
    return {"sample": sample.name, **proof}


def read_batching_results(folder: Path) -> dict[str, BatchingResult]:
    """The stored results by recipe; none if there are none yet."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    return {name: BatchingResult(**entry) for name, entry in json.loads(path.read_text()).items()}
