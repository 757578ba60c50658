"""Proves a recipe on one small model: complete, right by the masked sum, and right over ranks."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from shardkit.authoring.masked_sum import WEIGHTS, misses
from shardkit.checkpoint import Checkpoint
from shardkit.convert.split import merge_shards, split_checkpoint
from shardkit.errors import ShardkitError
from shardkit.planning.plan import Plan, make_plan
from shardkit.planning.summary import count_loaded_bytes, count_total_bytes, group_by_layout
from shardkit.recipe.recipe import Recipe
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.shards.manifest import Manifest
from shardkit.shards.reader import ShardedCheckpoint
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from shardkit.verification.report import Check, Verdict

ROUNDING = 1e-5  # of a summed layer; sound layouts miss by some 5e-7, the mildest fault by 0.1
FOREIGN = (
    AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """What was checked of a recipe on one model.

    `rules` are the patterns of those that the model used, each with the tensors that it names;
    `share` is the largest rank's part of the model's bytes.
    """

    checks: tuple[Check, ...]
    rules: Mapping[str, frozenset[str]] = field(default_factory=dict)
    share: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether every check was run and passed."""
        return all(check.verdict == "passed" for check in self.checks)


def prove(
    source: Path, recipe: Recipe, ranks: RankProcesses, scratch: Path, beams: int = 0
) -> Proof:
    """Check a recipe on a small checkpoint of one file, over `ranks`; the first failure ends it.

    `beams` also compares beam search, where the model has it.
    """
    trial = _Trial(source, recipe, ranks, scratch, beams)
    checks: list[Check] = []
    for name, step in trial.steps.items():
        checks.append(_tried(name, step))
        if checks[-1].verdict != "passed":
            return Proof(tuple(checks))
    return Proof(tuple(checks), trial.rules, trial.share)


@dataclass
class _Trial:
    """One recipe on one model, step by step: a step uses what those before it made."""

    source: Path
    recipe: Recipe
    ranks: RankProcesses
    scratch: Path
    beams: int

    @property
    def steps(self) -> dict[str, Callable[[], Check]]:
        return {
            "complete": self.complete, "masked sum": self.masked_sum, "merge": self.merge,
            "numerics": self.numerics,
        }  # fmt: skip

    @cached_property
    def plan(self) -> Plan:
        with Checkpoint(self.source) as checkpoint:
            return make_plan(checkpoint.specs(), self.recipe, checkpoint.config, self.ranks.size)

    @cached_property
    def manifest(self) -> Manifest:
        with Checkpoint(self.source) as checkpoint:
            return split_checkpoint(checkpoint, self.plan, self.recipe, self.scratch / "shards")

    @property
    def rules(self) -> dict[str, frozenset[str]]:
        found = defaultdict(set)
        for placement in self.plan.placements:
            found[self.recipe.rule_for(placement.spec.name).pattern].add(placement.spec.name)
        return {pattern: frozenset(names) for pattern, names in found.items()}

    @property
    def share(self) -> float:
        loaded = count_loaded_bytes(group_by_layout(self.plan), self.plan.tp_size)
        return max(loaded) / max(count_total_bytes(self.plan), 1)

    def complete(self) -> Check:
        """Every tensor has one rule, and every rank a part of what is divided."""
        return _check("complete", f"{len(self.plan.placements)} tensors, one rule each")

    def masked_sum(self) -> Check:
        """Ranks that keep only their own spans sum to the whole model, by transformers alone."""
        found = misses(self.source, self.recipe, self.ranks.size, self.scratch / "masked")
        worst = max(found, key=lambda name: found[name], default="")
        value = found.get(worst, 0.0)
        fault = "" if value < ROUNDING else f"{worst} misses its sum by {value:.1e}"
        told = f"{len(found)} layers miss by at most {value:.1e}"
        return _check("masked sum", told, fault, {"miss": value})

    def merge(self) -> Check:
        """A merge gives back the source's file, bit for bit."""
        assert self.manifest
        with ShardedCheckpoint(self.scratch / "shards") as shards:
            merge_shards(shards, self.scratch / "merged")
        same = (self.scratch / "merged" / WEIGHTS).read_bytes() == self._whole
        fault = "" if same else "the merged file is not the source's"
        return _check("merge", "bit for bit the source's", fault)

    def numerics(self) -> Check:
        """The shards over their ranks compute what the unsharded model does."""
        shards, sharded = self.scratch / "shards", ShardedModel(self.ranks)
        return check_numerics(shards, self.manifest, self.source, sharded, beams=self.beams)

    @property
    def _whole(self) -> bytes:
        return (self.source / WEIGHTS).read_bytes()


def _check(
    name: str, summary: str, fault: str = "", numbers: Mapping[str, object] | None = None
) -> Check:
    verdict: Verdict = "failed" if fault else "passed"
    return Check(name, verdict, summary, (fault,) if fault else (), numbers or {})


def _tried(name: str, step: Callable[[], Check]) -> Check:
    """A check; an error it ends in is a failure, whatever library it comes from."""
    try:
        return step()
    except ShardkitError as error:
        return _check(name, "cannot be run", str(error))
    except FOREIGN as error:
        told = str(error).split("\n")[0]
        return _check(name, "cannot be run", f"{type(error).__name__}: {told}")
