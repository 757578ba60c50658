"""Which recipes' requests share a batch, as it is stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardkit.authoring.stored_results import ResultsFile


@dataclass(frozen=True)
class BatchingResult:
    """The results of one recipe, as they are stored.

    Attributes:
        digest: The digest of the recipe and the samples that they are of.
        proofs: A JSON object for each sample and number of ranks.
    """

    digest: str
    proofs: Sequence[Mapping[str, Any]]

    @property
    def faults(self) -> list[str]:
        """What was wrong, by sample."""
        faults = [proof for proof in self.proofs if proof["fault"]]
        return [f"{p['sample']} at tp {p['tp_size']}: {p['fault']}" for p in faults]

    @property
    def obstacles(self) -> list[str]:
        """Why sequences of samples cannot join a batch, each reason once."""
        return list(dict.fromkeys(p["obstacle"] for p in self.proofs if p["obstacle"]))

    @property
    def summary(self) -> str:
        """In a few words: how many of the samples can join, or why none can."""
        samples = {proof["sample"] for proof in self.proofs}
        joining = samples - {proof["sample"] for proof in self.proofs if proof["obstacle"]}
        return f"{len(joining)} of {len(samples)}" if joining else "; ".join(self.obstacles)


BATCHING_RESULTS = ResultsFile("batching.json", BatchingResult)
