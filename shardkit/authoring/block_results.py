"""Whether blocks and whole models came to the same verdicts, as it is stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardkit.authoring.stored_results import ResultsFile


@dataclass(frozen=True)
class BlockResult:
    """The results of one recipe, as they are stored.

    Attributes:
        digest: The digest of the recipe and the samples that they are of.
        comparisons: A JSON object for each sample and fault.
    """

    digest: str
    comparisons: Sequence[Mapping[str, Any]]

    @property
    def faults(self) -> list[str]:
        """What both said otherwise, by sample."""
        return [f"{c['sample']}: {c['difference']}" for c in self.comparisons if c["difference"]]

    @property
    def summary(self) -> str:
        """Of how many verdicts both are equal, and how many faults no output shows."""
        unseen = sum(comparison.get("unseen", False) for comparison in self.comparisons)
        equal = len(self.comparisons) - len(self.faults) - unseen
        text = f"{equal} of {len(self.comparisons)}"
        return f"{text}; {unseen} by blocks alone" if unseen else text


BLOCK_RESULTS = ResultsFile("blocks.json", BlockResult)
