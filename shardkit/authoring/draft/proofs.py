"""Proves drafts on a tiny model over ranks, each text only once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from shardkit.authoring.draft.failure import SCRATCH
from shardkit.checkpoint import Checkpoint
from shardkit.errors import ShardkitError
from shardkit.planning import make_plan
from shardkit.recipe.parse import parse_recipe
from shardkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from shardkit.authoring.rank_pool import RankPool  # which loads torch

BEAMS = 3


@dataclass(frozen=True)
class ProofOutcome:
    """How a proof ended.

    Attributes:
        failed_check: The check that failed; empty if all passed.
        fault: What that check found.
        share: The largest rank's share of the model's bytes; 1.0 if a check failed.
    """

    failed_check: str = ""
    fault: str = ""
    share: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failed_check

    def to_json(self) -> dict[str, object]:
        """The outcome as JSON values."""
        return {
            "passed": self.passed,
            "failed": self.failed_check,
            "fault": self.fault,
            "share": self.share,
        }


@dataclass
class ProofCache:
    """Ranks to prove drafts on, and the outcomes so far."""

    pool: "RankPool"
    outcomes: dict[tuple[Path, str, int], ProofOutcome] = field(default_factory=dict)

    def prove_text(self, source: Path, text: str, tp_size: int) -> ProofOutcome:
        """Prove a recipe's text on a tiny checkpoint over `tp_size` ranks, unless it was before."""
        key = source, text, tp_size
        if key not in self.outcomes:
            self.outcomes[key] = self._prove_text(source, text, tp_size)
        return self.outcomes[key]

    def _prove_text(self, source: Path, text: str, tp_size: int) -> ProofOutcome:
        from shardkit.authoring.proof import prove_recipe

        with TemporaryDirectory(prefix=SCRATCH) as scratch:
            try:
                recipe, ranks = parse_draft(text), self.pool.of(tp_size)
                proof = prove_recipe(source, recipe, ranks, Path(scratch), BEAMS)
            except ShardkitError as error:
                return ProofOutcome("complete", str(error))
        for check in proof.checks:
            if check.verdict != "passed":
                return ProofOutcome(check.name, " ".join(check.faults) or check.summary)
        return ProofOutcome(share=proof.share)


def parse_draft(text: str) -> Recipe:
    """The recipe of a draft's text. Raises RecipeError."""
    return parse_recipe("draft", text.encode())


def max_tp_size(source: Path, text: str) -> int:
    """The most ranks that a recipe can divide a checkpoint over. Raises RecipeError."""
    with Checkpoint(source) as checkpoint:
        return make_plan(checkpoint.specs(), parse_draft(text), checkpoint.config, 1).max_tp_size


def list_unmatched(folder: Path, text: str) -> list[str]:
    """The tensors of a real checkpoint that a recipe has no rule for, from its headers alone."""
    recipe, unmatched = parse_draft(text), []
    with Checkpoint(folder) as checkpoint:
        for spec in checkpoint.specs():
            try:
                recipe.rule_for(spec.name)
            except ShardkitError:
                unmatched.append(spec.name)
    return unmatched


def outcomes_to_json(outcomes: Mapping[int, ProofOutcome]) -> dict[str, object]:
    """Outcomes by number of ranks, as JSON values."""
    return {str(tp_size): outcome.to_json() for tp_size, outcome in outcomes.items()}
