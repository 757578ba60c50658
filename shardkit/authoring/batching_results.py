"""Which recipes' requests share a batch, as it is stored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = "batching.json"


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


def read_batching_results(folder: Path) -> dict[str, BatchingResult]:
    """The stored results by recipe; none if there are none yet."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    return {name: BatchingResult(**entry) for name, entry in json.loads(path.read_text()).items()}


def write_batching_results(folder: Path, results: Mapping[str, BatchingResult]) -> None:
    """Store results, a line for each recipe."""
    lines = [f"{json.dumps(name)}: {json.dumps(asdict(r))}" for name, r in results.items()]
    (folder / RESULTS).write_text("{\n" + ",\n".join(lines) + "\n}\n")
