"""What `shardkit recipes check` runs and says."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardkit.authoring.check import Trial, caught, make_models, try_recipe
from shardkit.authoring.rank_pool import RankPool
from shardkit.cli.options import status_line
from shardkit.cli.output import format_count, print_line
from shardkit.recipe.recipe import Recipe


def run_checks(
    recipe: Recipe, config: Path | None, tp_sizes: Sequence[int], mutants: int
) -> dict[str, Any]:
    """The proofs of a recipe, and of errors planted in it, as JSON values."""
    with (
        tempfile.TemporaryDirectory(prefix="shardkit-") as folder,
        RankPool() as pool,
        status_line() as tell,
    ):
        tell("making small models")
        models = make_models(recipe, config, Path(folder))
        trials = []
        for trial in try_recipe(recipe, models, tp_sizes, pool):
            trials.append(trial)
            tell(f"{len(trials)} of {len(models) * len(tp_sizes)} proofs: {trial.model}")
        good = all(trial.proof.passed for trial in trials)
        unused = _unused(recipe, trials) if good else []
        planted = _plant(recipe, models, trials, pool, mutants) if good else []
    return {
        "recipe": recipe.name,
        "passed": good and all(entry["caught"] for entry in planted if entry["telling"]),
        "trials": [_trial_json(trial) for trial in trials],
        "unused_rules": unused,
        "mutants": planted,
    }


def say_results(results: dict[str, Any]) -> None:
    """Every model's verdict, and the first fault of each that failed."""
    for trial in results["trials"]:
        verdict = "passed" if trial["passed"] else "FAILED"
        last = trial["checks"][-1]
        share = f"largest rank {trial['share']:.0%} of the bytes; " if trial["passed"] else ""
        where = "" if trial["passed"] else f"{last['name']}: "
        print_line(
            f"{verdict} {trial['model']} at tp {trial['tp_size']}: {share}{where}{last['summary']}"
        )
        for fault in last["faults"]:
            print_line(f"  {fault}")
    for pattern in results["unused_rules"]:
        print_line(f"not used by any of these models: {pattern}")
    if planted := results["mutants"]:
        found = sum(entry["caught"] for entry in planted)
        print_line(f"{format_count(len(planted), 'error')} planted, {found} caught")
        for entry in planted:
            if not entry["caught"]:
                how = "NOT CAUGHT" if entry["telling"] else "changes nothing here:"
                print_line(f"  {how} {entry['fault']}: {entry['pattern']}")


def _plant(
    recipe: Recipe, models: dict[str, Path], trials: Sequence[Trial], pool: RankPool, at_most: int
) -> list[dict[str, Any]]:
    rules = {trial.model: trial.proof.rules for trial in trials}
    checkpoints = [(models[name], used) for name, used in rules.items()]
    return [
        {"fault": mutant.fault, "pattern": mutant.pattern, "caught": not proof.passed,
         "by": proof.checks[-1].name, "telling": mutant.telling}
        for mutant, proof in caught(recipe, checkpoints, trials[0].tp_size, pool, at_most)
    ]  # fmt: skip


def _unused(recipe: Recipe, trials: Sequence[Trial]) -> list[str]:
    used = {pattern for trial in trials for pattern in trial.proof.rules}
    return [rule.pattern for rule in recipe.rules if rule.pattern not in used]


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "model": trial.model,
        "tp_size": trial.tp_size,
        "passed": trial.proof.passed,
        "share": round(trial.proof.share, 4),
        "checks": [asdict(check) for check in trial.proof.checks],
    }
