"""Proves recipes on all of their samples, runs mutants of each, and stores the results.

The results are published in `recipes/proofs/results.json`, and the page made of them next to it.
"""

import hashlib
import json
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardkit.authoring.batching_results import BATCHING_RESULTS
from shardkit.authoring.block_results import BLOCK_RESULTS
from shardkit.authoring.check import SCRATCH, ModelProof, prove_on_models, run_mutants
from shardkit.authoring.families_page import render_families
from shardkit.authoring.form_check import summarize_forms
from shardkit.authoring.format_sweep import FORMAT_RESULTS, count_proofs
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, find_samples, make_sample
from shardkit.authoring.served import read_served
from shardkit.authoring.stored_results import ResultsFile, StoredResult
from shardkit.recipe import Recipe, compose_recipe
from shardkit.verification.input_table import find_input_table

TP_SIZES = (2, 4)
AWKWARD_TP_SIZES = (2, 3, 4)  # of samples whose sizes divide unevenly
MAX_MUTANTS = 16
MUTANT_TP_SIZE = 2
FORM_TP_SIZE = 2
PAGE = "FAMILIES.md"
MIN_DETECTED = 3  # mutants of a recipe that must have been detected at least


@dataclass(frozen=True)
class SweepResult:
    """The results of one recipe, as they are stored.

    Attributes:
        digest: The digest of the recipe and the samples that the results are of.
        proofs: A JSON object for each proof.
        mutants: A JSON object for each mutant.
        forms: A JSON object for each model type: in how many forms its first sample was tried.
    """

    digest: str
    proofs: Sequence[Mapping[str, Any]]
    mutants: Sequence[Mapping[str, Any]]
    forms: Sequence[Mapping[str, Any]] = ()

    @property
    def failed_proofs(self) -> list[Mapping[str, Any]]:
        """The proofs that failed."""
        return [proof for proof in self.proofs if not proof["passed"]]

    @property
    def detected(self) -> int:
        """How many mutants were detected."""
        return sum(mutant["detected"] for mutant in self.mutants)

    @property
    def missed(self) -> list[Mapping[str, Any]]:
        """The mutants that should have been detected and were not."""
        return [m for m in self.mutants if m["must_be_detected"] and not m["detected"]]

    @property
    def failed_forms(self) -> list[str]:
        """The forms that transformers loads, and that do not run or compute something else."""
        return [fault for forms in self.forms for fault in forms["faults"]]

    @property
    def passed(self) -> bool:
        """Whether every proof passed and no mutant was missed; forms are told by themselves."""
        is_proven = bool(self.proofs) and not self.failed_proofs
        return is_proven and not self.missed and self.detected >= MIN_DETECTED


SWEEP_RESULTS = ResultsFile("results.json", SweepResult)


def sweep_recipe(recipe: Recipe, pool: RankPool) -> SweepResult:
    """Prove a recipe on every sample over 2 and 4 ranks, and run mutants of it."""
    samples = find_samples(recipe)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        models = {s.name: make_sample(s, Path(scratch) / s.name) for s in samples}
        proofs: list[Mapping[str, Any]] = []
        rules = {}
        for sample in samples:
            sizes = AWKWARD_TP_SIZES if "awkward" in sample.group else TP_SIZES
            source = models[sample.name]
            for proof in prove_on_models(recipe, {sample.name: source}, sizes, pool):
                proofs.append(_proof_to_json(proof, sample))
                if proof.tp_size == MUTANT_TP_SIZE and not proof.expert_parallel:
                    rules[source] = proof.proof.rules
        results = run_mutants(recipe, rules, MUTANT_TP_SIZE, pool, MAX_MUTANTS)
        mutants = [result.to_json() for result in results]
        forms = sweep_forms(samples, pool, Path(scratch))
    return SweepResult(digest_inputs(recipe), proofs, mutants, forms)


def sweep_forms(
    samples: Sequence[Sample], pool: RankPool, scratch: Path
) -> list[Mapping[str, Any]]:
    """Try the first sample of each model type in every form in which checkpoints are found."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.model_type, sample)
    return [
        summarize_forms(each, pool.of(FORM_TP_SIZE), scratch / f"{each.name}-forms")
        for each in first.values()
    ]


def digest_inputs(recipe: Recipe) -> str:
    """The digest of a recipe and of the samples that prove it; results of another are stale."""
    parts = [recipe.sha256]
    for sample in find_samples(recipe):
        values = sample.name, sample.model, sample.config, sample.limitation, sample.as_built
        parts.append(json.dumps([*values, sample.group]))
        if sample.generation:
            parts.append(json.dumps(sample.generation))
        if (inputs := find_input_table(sample.model_type)) is not None:
            parts.append(json.dumps([inputs.arguments, inputs.placeholders]))
        if recipe.parts:
            parts.append(compose_recipe(recipe, sample.stored_config).sha256)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def write_results(
    folder: Path, results: Mapping[str, SweepResult], recipes: Sequence[Recipe]
) -> None:
    """Store the results of these recipes, and the page made of them; drop those of any other."""
    kept = {recipe.name: results[recipe.name] for recipe in recipes if recipe.name in results}
    SWEEP_RESULTS.write(folder, kept)
    (folder / PAGE).write_text(render_page(kept, recipes, folder))


def render_page(results: Mapping[str, SweepResult], recipes: Sequence[Recipe], folder: Path) -> str:
    """The page of all families in Markdown, with what else is stored in the folder."""
    formats = count_proofs(FORMAT_RESULTS.read(folder))
    entries = list_entries(results, recipes)
    batching = {name: each.summary for name, each in BATCHING_RESULTS.read(folder).items()}
    blocks = {name: each.summary for name, each in BLOCK_RESULTS.read(folder).items()}
    columns = batching, blocks
    return render_families(entries, read_omissions(folder), read_served(folder), formats, *columns)


def read_omissions(folder: Path) -> dict[str, str]:
    """The generative model types that have no recipe, and why."""
    path = folder / "omitted.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def list_entries(
    results: Mapping[str, SweepResult], recipes: Sequence[Recipe]
) -> list[tuple[Recipe, dict[str, Any]]]:
    """The recipes that have results, each with these as JSON values."""
    return [(r, asdict(results[r.name])) for r in recipes if r.name in results]


def list_alone(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes that are proven by themselves; the others are proven as parts of these."""
    return [recipe for recipe in recipes if not recipe.part_only]


def list_stale(results: Mapping[str, StoredResult], recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes that have no results, or have changed since, or whose samples have."""
    return [
        recipe
        for recipe in list_alone(recipes)
        if recipe.name not in results or results[recipe.name].digest != digest_inputs(recipe)
    ]


def sweep_recipes(
    selected: Sequence[Recipe], recipes: Sequence[Recipe], folder: Path
) -> Iterator[tuple[Recipe, SweepResult]]:
    """Sweep the selected recipes and store each result as it is done.

    Args:
        selected: The recipes to sweep.
        recipes: All recipes; the stored results of the others are kept.
        folder: Where the results are stored.
    """
    results = SWEEP_RESULTS.read(folder)
    with RankPool() as pool:
        for recipe in list_alone(selected):
            results[recipe.name] = result = sweep_recipe(recipe, pool)
            write_results(folder, results, recipes)
            yield recipe, result


def _proof_to_json(proof: ModelProof, sample: Sample) -> dict[str, Any]:
    """One proof's numbers."""
    checks = proof.proof.checks
    numbers = {check.name: dict(check.numbers) for check in checks}
    fault = "" if proof.proof.passed else f"{checks[-1].name}: {' '.join(checks[-1].faults)}"
    return {
        "sample": sample.name,
        "model_type": sample.model_type,
        "limitation": sample.limitation,
        "tp_size": proof.tp_size,
        "passed": proof.proof.passed,
        "fault": fault,
        "share": round(proof.proof.share, 4),
        "masked_sum": numbers.get("masked sum", {}).get("error"),
        "numerics": numbers.get("numerics", {}),
        "plan": numbers.get("plan", {}),
        **({"expert_parallel": True} if proof.expert_parallel else {}),
    }
