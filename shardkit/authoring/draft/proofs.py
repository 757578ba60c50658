"""Tries drafts on a small model over ranks, and keeps the ranks running between trials."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from shardkit.checkpoint import Checkpoint
from shardkit.errors import ShardkitError
from shardkit.planning.placement import make_plan
from shardkit.recipe.parse import load_recipe

if TYPE_CHECKING:
    from shardkit.authoring.rank_pool import RankPool  # which loads torch

BEAMS = 3


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: the check that failed, and its fault; empty where all passed."""

    failed: str = ""
    fault: str = ""
    share: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failed


@dataclass
class Bench:
    """Ranks to try drafts on, and what became of those that were."""

    pool: "RankPool"
    known: dict[tuple[Path, str, int], Outcome] = field(default_factory=dict)

    def attempt(self, source: Path, text: str, tp_size: int) -> Outcome:
        """Prove a recipe's text on a small checkpoint over `tp_size` ranks; what is known, once."""
        key = source, text, tp_size
        if key not in self.known:
            self.known[key] = self._attempt(source, text, tp_size)
        return self.known[key]

    def _attempt(self, source: Path, text: str, tp_size: int) -> Outcome:
        from shardkit.authoring.proof import prove

        with TemporaryDirectory(prefix="shardkit-draft-") as folder:
            path = Path(folder) / "draft.toml"
            path.write_text(text, encoding="utf-8")
            try:
                recipe = load_recipe(path)
                proof = prove(source, recipe, self.pool.of(tp_size), Path(folder), BEAMS)
            except ShardkitError as error:
                return Outcome("complete", str(error).replace(f"{path}: ", ""))
        for check in proof.checks:
            if check.verdict != "passed":
                return Outcome(check.name, " ".join(check.faults) or check.summary)
        return Outcome(share=proof.share)


def most_ranks(source: Path, text: str) -> int:
    """The most ranks that a recipe divides a checkpoint over.  Raises RecipeError."""
    with TemporaryDirectory(prefix="shardkit-draft-") as folder, Checkpoint(source) as checkpoint:
        path = Path(folder) / "draft.toml"
        path.write_text(text, encoding="utf-8")
        recipe = load_recipe(path)
        return make_plan(checkpoint.specs(), recipe, checkpoint.config, 1).max_tp_size


def unmatched(folder: Path, text: str) -> list[str]:
    """The tensors of a real checkpoint that a recipe has no rule for, by its headers alone."""
    with TemporaryDirectory(prefix="shardkit-draft-") as made, Checkpoint(folder) as checkpoint:
        path = Path(made) / "draft.toml"
        path.write_text(text, encoding="utf-8")
        recipe = load_recipe(path)
        found = []
        for spec in checkpoint.specs():
            try:
                recipe.rule_for(spec.name)
            except ShardkitError:
                found.append(spec.name)
        return found


def outcomes_json(outcomes: Mapping[int, Outcome]) -> dict[str, object]:
    """Outcomes by tp_size, for a program."""
    return {
        str(size): {"passed": o.passed, "failed": o.failed, "fault": o.fault, "share": o.share}
        for size, o in outcomes.items()
    }
