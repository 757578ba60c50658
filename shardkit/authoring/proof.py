"""Proves a recipe on one small model: complete, right by masked sum and over ranks, as planned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shardkit.authoring.masked_sum import WEIGHT_FILE, load_reference, masked_sum_errors
from shardkit.authoring.mutations import list_rules
from shardkit.authoring.usage_check import compare_usage
from shardkit.checkpoint import Checkpoint, read_config
from shardkit.convert import (
    merge_destination,
    merge_shards,
    shard_destination,
    split_checkpoint,
)
from shardkit.errors import MODEL_ERRORS, ShardkitError
from shardkit.planning import Plan, make_plan, summarize_plan
from shardkit.recipe import Recipe, compose_recipe
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.shards.manifest import Manifest
from shardkit.shards.reader import ShardedCheckpoint
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from shardkit.verification.report import Check, Verdict

MAX_ROUNDING = 1e-5  # of a summed layer: right layouts err by about 5e-7, the mildest fault by 0.1


@dataclass(frozen=True)
class Proof:
    """What was checked of a recipe on one model.

    Attributes:
        checks: The checks, up to the first that failed.
        rules: The patterns of the rules that the model used, each with the tensors that it names.
        share: The largest rank's share of the model's bytes.
    """

    checks: tuple[Check, ...]
    rules: Mapping[str, frozenset[str]] = field(default_factory=dict)
    share: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether every check was run and passed."""
        return all(check.verdict == "passed" for check in self.checks)


def prove_recipe(
    source: Path,
    recipe: Recipe,
    ranks: RankProcesses,
    scratch: Path,
    beams: int = 0,
    with_plan: bool = False,
    expert_parallel: bool = False,
) -> Proof:
    """Check a recipe on a small checkpoint of one file; stop at the first check that fails.

    Args:
        source: The checkpoint folder.
        recipe: The recipe to prove.
        ranks: The ranks to run the shards on.
        scratch: An empty folder for the shards.
        beams: If not 0, also compare beam search over so many beams, if the model has it.
        with_plan: Also measure what the plan predicts: collectives, cache and weights.
        expert_parallel: Whether each rank has whole experts.
    """
    recipe = compose_recipe(recipe, read_config(source))
    run = _ProofRun(source, recipe, ranks, scratch, beams, expert_parallel)
    steps = run.steps | ({"plan": run.check_plan} if with_plan else {})
    checks: list[Check] = []
    for name, step in steps.items():
        checks.append(_run_step(name, step))
        if checks[-1].verdict != "passed":
            return Proof(tuple(checks))
    return Proof(tuple(checks), list_rules(run.recipe, run.plan), run.share)


@dataclass
class _ProofRun:
    """One recipe on one model, step by step; each step uses what those before it made."""

    source: Path
    recipe: Recipe
    ranks: RankProcesses
    scratch: Path
    beams: int
    expert_parallel: bool

    @property
    def steps(self) -> dict[str, Callable[[], Check]]:
        return {
            "complete": self.check_complete,
            "masked sum": self.check_masked_sum,
            "merge": self.check_merge,
            "numerics": self.check_numerics,
        }

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self.source)

    @cached_property
    def plan(self) -> Plan:
        with Checkpoint(self.source) as checkpoint:
            specs, config = checkpoint.specs(), checkpoint.config
            return make_plan(specs, self.recipe, config, self.ranks.size, self.expert_parallel)

    @cached_property
    def manifest(self) -> Manifest:
        with Checkpoint(self.source) as checkpoint:
            return split_checkpoint(
                checkpoint, self.plan, self.recipe, shard_destination(self.scratch / "shards")
            )

    @property
    def share(self) -> float:
        summary = summarize_plan(self.plan)
        return max(summary.loaded_bytes) / max(summary.total_bytes, 1)

    def check_complete(self) -> Check:
        """Every tensor has one rule, and every rank a part of what is divided."""
        return _make_check("complete", f"{len(self.plan.placements)} tensors, one rule each")

    def check_masked_sum(self) -> Check:
        """Ranks that keep only their own spans sum to the whole model, by transformers alone."""
        folder, size = self.scratch / "masked", self.ranks.size
        errors = masked_sum_errors(self.source, self.recipe, size, folder, self.expert_parallel)
        worst = max(errors, key=lambda name: errors[name], default="")
        error = errors.get(worst, 0.0)
        fault = "" if error < MAX_ROUNDING else f"the masked sum of {worst} is off by {error:.1e}"
        summary = f"{len(errors)} layers are off by at most {error:.1e}"
        return _make_check("masked sum", summary, fault, {"error": error})

    def check_merge(self) -> Check:
        """A merge gives back the source's file, bit for bit."""
        assert self.manifest
        with ShardedCheckpoint(self.scratch / "shards") as shards:
            merge_shards(shards, merge_destination(shards.manifest, self.scratch / "merged"))
        merged = (self.scratch / "merged" / WEIGHT_FILE).read_bytes()
        is_same = merged == (self.source / WEIGHT_FILE).read_bytes()
        fault = "" if is_same else "the merged file is not the source's"
        return _make_check("merge", "bit for bit the source's", fault)

    def check_numerics(self) -> Check:
        """The shards over their ranks compute what the unsharded model does."""
        shards, sharded = self.scratch / "shards", ShardedModel(self.ranks)
        return check_numerics(shards, self.manifest, self.source, sharded, beams=self.beams)

    def check_plan(self) -> Check:
        """What the plan predicts is what the ranks use; they have loaded the shards already."""
        reference, sharded = load_reference(self.source), ShardedModel(self.ranks)
        figures = compare_usage(self.plan, self.config, reference, sharded)
        unknown = [figure.name for figure in figures if isinstance(figure.predicted, str)]
        summary = f"{len(figures) - len(unknown)} numbers are as predicted"
        summary += f"; not predicted: {', '.join(unknown)}" if unknown else ""
        faults = tuple(figure.fault for figure in figures if figure.fault)
        numbers = {figure.name: figure.to_json() for figure in figures}
        return Check("plan", "failed" if faults else "passed", summary, faults, numbers)


def _make_check(
    name: str, summary: str, fault: str = "", numbers: Mapping[str, object] | None = None
) -> Check:
    verdict: Verdict = "failed" if fault else "passed"
    return Check(name, verdict, summary, (fault,) if fault else (), numbers or {})


def _run_step(name: str, step: Callable[[], Check]) -> Check:
    """A check; if it raises, whatever library the error comes from, it has failed."""
    try:
        return step()
    except ShardkitError as error:
        return _make_check(name, "cannot be run", str(error))
    except MODEL_ERRORS as error:
        message = str(error).split("\n")[0]
        return _make_check(name, "cannot be run", f"{type(error).__name__}: {message}")
