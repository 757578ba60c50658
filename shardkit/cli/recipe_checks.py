"""What `shardkit recipes check` runs and says."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardkit.cli.text import plural, say
from shardkit.recipe import Recipe
from shardkit.runtime.ranks import Ranks
from shardkit.verify.trials import Trial, caught, make_models, try_recipe


def run_checks(
    recipe: Recipe, config: Path | None, tp_sizes: Sequence[int], mutants: int
) -> dict[str, Any]:
    """The proofs of a recipe, and of errors planted in it, as JSON values."""
    with tempfile.TemporaryDirectory(prefix="shardkit-") as folder:
        models = make_models(recipe, config, Path(folder))
        trials = list(try_recipe(recipe, models.items(), tp_sizes))
        unused = _unused(recipe, trials)
        good = all(trial.proof.passed for trial in trials)
        planted = _plant(recipe, models, trials, tp_sizes[0], mutants) if good else []
    return {
        "recipe": recipe.name,
        "passed": good and all(entry["caught"] for entry in planted),
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
        say(f"{verdict} {trial['model']} at tp {trial['tp_size']}: {share}{where}{last['summary']}")
        for fault in last["faults"]:
            say(f"  {fault}")
    for pattern in results["unused_rules"]:
        say(f"not used by any of these models: {pattern}")
    if planted := results["mutants"]:
        found = sum(entry["caught"] for entry in planted)
        say(f"{plural(len(planted), 'error')} planted, {found} caught")
        for entry in planted:
            if not entry["caught"]:
                say(f"  NOT CAUGHT {entry['fault']}: {entry['pattern']}")


def _plant(
    recipe: Recipe, models: dict[str, Path], trials: Sequence[Trial], tp_size: int, at_most: int
) -> list[dict[str, Any]]:
    if not at_most:
        return []
    rules = {trial.model: trial.proof.used for trial in trials}
    with Ranks(tp_size) as ranks:
        return [
            {"fault": mutant.fault, "pattern": mutant.pattern, "caught": not proof.passed,
             "by": proof.checks[-1].name}
            for mutant, proof in caught(
                recipe, [(models[name], used) for name, used in rules.items()], ranks, at_most
            )
        ]  # fmt: skip


def _unused(recipe: Recipe, trials: Sequence[Trial]) -> list[str]:
    used = frozenset[str]().union(*(trial.proof.used for trial in trials))
    return [rule.pattern for rule in recipe.rules if rule.pattern not in used]


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "model": trial.model,
        "tp_size": trial.tp_size,
        "passed": trial.proof.passed,
        "share": round(trial.proof.share, 4),
        "checks": [asdict(check) for check in trial.proof.checks],
    }
