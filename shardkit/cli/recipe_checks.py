"""What `shardkit recipes check` runs and prints."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardkit.authoring.check import ModelProof, make_models, prove_on_models, run_mutants
from shardkit.authoring.column_sweep import ColumnSweep, Result
from shardkit.authoring.format_sweep import sweep_formats
from shardkit.authoring.model_classes import write_model_classes
from shardkit.authoring.publishing import find_proofs_folder
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.sweep import SWEEP_RESULTS, SweepResult, list_stale, sweep_recipes
from shardkit.cli.options import status_line
from shardkit.cli.output import format_count, print_line
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.model_classes import CLASSES_FILE
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.recipe import Recipe


def run_checks(
    recipe: Recipe, config: Path | None, tp_sizes: Sequence[int], mutants: int
) -> dict[str, Any]:
    """Prove a recipe on its samples or on a config, and run mutants of it.

    Args:
        recipe: The recipe.
        config: A folder with a small config.json, or None for the bundled samples.
        tp_sizes: The numbers of ranks to prove it over.
        mutants: How many mutants to run at most, over the first of these numbers of ranks.

    Returns:
        The results as JSON values.
    """
    with (
        tempfile.TemporaryDirectory(prefix="shardkit-") as folder,
        RankPool() as pool,
        status_line() as report,
    ):
        report("making small models")
        models = make_models(recipe, config, Path(folder))
        proofs = []
        for proof in prove_on_models(recipe, models, tp_sizes, pool):
            proofs.append(proof)
            report(f"{format_count(len(proofs), 'proof')} of {format_count(len(models), 'model')}")
        is_proven = all(proof.proof.passed for proof in proofs)
        rules = {models[p.model]: p.proof.rules for p in proofs if not p.expert_parallel}
        limit = mutants if is_proven else 0
        results = [*run_mutants(recipe, rules, tp_sizes[0], pool, limit)]
    return {
        "recipe": recipe.name,
        "passed": is_proven and not any(result.missed for result in results),
        "proofs": [_proof_to_json(proof) for proof in proofs],
        "unused_rules": _list_unused(recipe, proofs) if is_proven else [],
        "mutants": [result.to_json() for result in results],
    }


def print_results(results: dict[str, Any]) -> None:
    """Print the verdict of every model, the first fault of each that failed, and the mutants."""
    for proof in results["proofs"]:
        _print_proof(proof)
    for pattern in results["unused_rules"]:
        print_line(f"not used by any of these models: {pattern}")
    if mutants := results["mutants"]:
        detected = sum(mutant["detected"] for mutant in mutants)
        print_line(f"{detected} of {format_count(len(mutants), 'injected fault')} detected")
        _print_undetected(mutants)


def run_sweep(names: Sequence[str], only_stale: bool) -> bool:
    """Prove recipes on all samples, run mutants, and publish the results in the checkout.

    Args:
        names: The recipes; all of them if empty.
        only_stale: Whether to leave out those whose results are up to date.

    Returns:
        Whether every proof passed and no mutant was missed.
    """
    folder = find_proofs_folder()
    recipes = [load_recipe(path) for path in list_recipe_files()]
    selected = [recipe for recipe in recipes if not names or recipe.name in names]
    if only_stale:
        selected = list_stale(SWEEP_RESULTS.read(folder), selected)
    passed = True
    for recipe, result in sweep_recipes(selected, recipes, folder):
        _print_sweep(recipe, result)
        passed = passed and result.passed
    types = {kind for recipe in selected for kind in recipe.model_types}
    write_model_classes(folder.parent / CLASSES_FILE, types)
    print_line(f"{format_count(len(selected), 'recipe')} checked; results in {folder}")
    return passed


def run_format_sweep(only_stale: bool) -> bool:
    """Prove quantized formats, inject faults, and publish the results in the checkout.

    Args:
        only_stale: Whether to leave out those whose results are up to date.

    Returns:
        Whether every proof passed and no fault was missed.
    """
    passed = True
    for name, result in sweep_formats(find_proofs_folder(), only_stale):
        verdicts = Counter(proof["verdict"] for proof in result.proofs)
        num_detected = sum(bool(fault["finding"]) for fault in result.faults)
        print_line(
            f"{name}: {verdicts['proven']} proven, {verdicts['refused']} refused,"
            f" {num_detected} of {format_count(len(result.faults), 'injected fault')} found"
        )
        for proof in result.proofs:
            if proof["verdict"] == "failed":
                print_line(f"  FAILED {proof['model']} at tp {proof['tp_size']}: {proof['detail']}")
        for fault in result.faults:
            if not fault["finding"]:
                print_line(f"  NOT FOUND {fault['fault']}")
        passed = passed and result.passed
    return passed


def run_column_sweep(sweep: ColumnSweep[Result], only_stale: bool) -> bool:
    """Examine every recipe for a column of the page, and publish the results in the checkout.

    Args:
        sweep: What the column shows.
        only_stale: Whether to leave out recipes whose results are up to date.

    Returns:
        Whether nothing was wrong.
    """
    passed = True
    recipes = [load_recipe(path) for path in list_recipe_files()]
    for recipe, result in sweep.run(recipes, find_proofs_folder(), only_stale):
        print_line(f"{recipe.name}: {result.summary}")
        for fault in result.faults:
            print_line(f"  FAILED {fault}")
        passed = passed and not result.faults
    return passed


def _print_sweep(recipe: Recipe, result: SweepResult) -> None:
    proven = len(result.proofs) - len(result.failed_proofs)
    print_line(
        f"{recipe.name}: {proven} of {len(result.proofs)} proofs,"
        f" {result.detected} of {len(result.mutants)} injected faults detected"
    )
    for proof in result.failed_proofs:
        print_line(f"  FAILED {proof['sample']} at tp {proof['tp_size']}: {proof['fault']}")
    for fault in result.failed_forms:
        print_line(f"  form: {fault}")
    for mutant in result.missed:
        print_line(f"  NOT DETECTED {mutant['fault']}: {mutant['pattern']}")


def _print_proof(proof: dict[str, Any]) -> None:
    last = proof["checks"][-1]
    whole = " with whole experts" if proof["expert_parallel"] else ""
    title = f"{proof['model']} at tp {proof['tp_size']}{whole}"
    if proof["passed"]:
        print_line(
            f"passed {title}: largest rank {proof['share']:.0%} of the bytes; {last['summary']}"
        )
        return
    print_line(f"FAILED {title}: {last['name']}: {last['summary']}")
    for fault in last["faults"]:
        print_line(f"  {fault}")


def _print_undetected(mutants: Sequence[dict[str, Any]]) -> None:
    for mutant in mutants:
        if not mutant["detected"]:
            title = "NOT DETECTED" if mutant["must_be_detected"] else "changes nothing here:"
            print_line(f"  {title} {mutant['fault']}: {mutant['pattern']}")


def _list_unused(recipe: Recipe, proofs: Sequence[ModelProof]) -> list[str]:
    used = {pattern for proof in proofs for pattern in proof.proof.rules}
    return [rule.pattern for rule in recipe.rules if rule.pattern not in used]


def _proof_to_json(proof: ModelProof) -> dict[str, Any]:
    return {
        "model": proof.model,
        "tp_size": proof.tp_size,
        "expert_parallel": proof.expert_parallel,
        "passed": proof.proof.passed,
        "share": round(proof.proof.share, 4),
        "checks": [asdict(check) for check in proof.proof.checks],
    }
