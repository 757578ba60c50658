"""Proves every recipe on every sample and plants errors in each; writes what it finds for the docs.

    python -m tests.sweep            every recipe: `make sweep`, an hour or so
    python -m tests.sweep llama t5   these only; the others' results are kept
    python -m tests.sweep --stale    those whose recipe or samples have changed since

Exits with 1 if a proof fails or an error that should be caught is not.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  (sets the libraries' environment first)
from shardkit.authoring.check import Trial, caught, served_samples, try_recipe
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, make_sample
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.recipe import Recipe
from tests.results import RESULTS, TABLE, digest, rendered

TP_SIZES = (2, 4)
AWKWARD_TP_SIZES = (2, 3, 4)
MUTANTS = 16
MUTANT_TP_SIZE = 2


def main(arguments: list[str]) -> int:
    recipes = [load_recipe(path) for path in list_recipe_files()]
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "--stale" in arguments:
        wanted = {r.name for r in recipes if known.get(r.name, {}).get("digest") != digest(r)}
    else:
        wanted = set(arguments) or {r.name for r in recipes}
    good = True
    with RankPool() as pool:
        for recipe in recipes:
            if recipe.name in wanted:
                started = time.monotonic()
                known[recipe.name] = entry = swept(recipe, pool)
                passed = says(recipe.name, entry, time.monotonic() - started)
                good = good and passed
                write(recipes, known)
    return 0 if good else 1


def swept(recipe: Recipe, pool: RankPool) -> dict[str, Any]:
    """Every proof of a recipe, and every error planted in it."""
    samples = served_samples(recipe)
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        models = {s.name: make_sample(s, Path(scratch) / s.name) for s in samples}
        trials: list[Trial] = []
        for sample in samples:
            sizes = AWKWARD_TP_SIZES if "awkward" in sample.group else TP_SIZES
            trials += try_recipe(recipe, {sample.name: models[sample.name]}, sizes, pool)
        rules = [(models[t.model], t.proof.rules) for t in trials if t.tp_size == MUTANT_TP_SIZE]
        planted = [
            {"fault": mutant.fault, "pattern": mutant.pattern, "telling": mutant.telling,
             "caught": not proof.passed, "by": "" if proof.passed else proof.checks[-1].name}
            for mutant, proof in caught(recipe, rules, MUTANT_TP_SIZE, pool, MUTANTS)
        ]  # fmt: skip
    return {
        "digest": digest(recipe),
        "trials": [trial_row(trial, samples) for trial in trials],
        "mutants": planted,
    }


def trial_row(trial: Trial, samples: list[Sample]) -> dict[str, Any]:
    """One proof's numbers, as JSON values."""
    proof = trial.proof
    sample = next(sample for sample in samples if sample.name == trial.model)
    numbers = {check.name: dict(check.numbers) for check in proof.checks}
    last = proof.checks[-1]
    return {
        "sample": trial.model,
        "model_type": sample.model_type,
        "apart": sample.apart,
        "tp_size": trial.tp_size,
        "passed": proof.passed,
        "fault": "" if proof.passed else f"{last.name}: {' '.join(last.faults)}",
        "share": round(proof.share, 4),
        "masked_sum": numbers.get("masked sum", {}).get("miss"),
        "numerics": numbers.get("numerics", {}),
    }


def says(name: str, entry: dict[str, Any], seconds: float) -> bool:
    """A line of what was found; whether all of it is as it should be."""
    trials, planted = entry["trials"], entry["mutants"]
    failed = [t for t in trials if not t["passed"]]
    missed = [m for m in planted if m["telling"] and not m["caught"]]
    found = sum(m["caught"] for m in planted)
    print(
        f"{name}: {len(trials) - len(failed)} of {len(trials)} proofs,"
        f" {found} of {len(planted)} errors caught, {seconds:.0f} s",
        flush=True,
    )
    for trial in failed:
        print(f"  FAILED {trial['sample']} tp {trial['tp_size']}: {trial['fault']}", flush=True)
    for mutant in missed:
        print(f"  NOT CAUGHT {mutant['fault']}: {mutant['pattern']}", flush=True)
    return not failed and not missed and bool(trials) and found >= 3


def write(recipes: list[Recipe], known: dict[str, Any]) -> None:
    """Keep the results, and the table made of them; of recipes that are gone, nothing."""
    kept = {recipe.name: known[recipe.name] for recipe in recipes if recipe.name in known}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in kept.items()]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    TABLE.write_text(rendered(kept, recipes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
