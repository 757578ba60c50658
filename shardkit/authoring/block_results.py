"""Whether blocks and whole models came to the same verdicts, as it is stored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = "blocks.json"


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
    def differences(self) -> list[str]:
        """What differed, by sample."""
        return [f"{c['sample']}: {c['difference']}" for c in self.comparisons if c["difference"]]

    @property
    def summary(self) -> str:
        """Of how many verdicts both are equal, and how many faults no output shows."""
        unseen = sum(comparison.get("unseen", False) for comparison in self.comparisons)
        equal = len(self.comparisons) - len(self.differences) - unseen
        text = f"{equal} of {len(self.comparisons)}"
        return f"{text}; {unseen} by blocks alone" if unseen else text


def read_block_results(folder: Path) -> dict[str, BlockResult]:
    """The stored results by recipe; none if there are none yet."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    return {name: BlockResult(**entry) for name, entry in json.loads(path.read_text()).items()}


def write_block_results(folder: Path, results: Mapping[str, BlockResult]) -> None:
    """Store results, a line for each recipe."""
    lines = [f"{json.dumps(name)}: {json.dumps(asdict(r))}" for name, r in results.items()]
    (folder / RESULTS).write_text("{\n" + ",\n".join(lines) + "\n}\n")
