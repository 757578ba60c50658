"""What the sweep of all recipes found, as data, and the page that is made of it."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.authoring.check import served_samples
from shardkit.recipe.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RESULTS = FOLDER / "results.json"
TABLE = FOLDER / "FAMILIES.md"


def digest(recipe: Recipe) -> str:
    """Of a recipe and the samples that prove it: results of another digest are old."""
    told = [recipe.sha256, *(repr(sample) for sample in served_samples(recipe))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def rendered(results: Mapping[str, Any], recipes: Sequence[Recipe]) -> str:
    """The page, from the results by recipe."""
    by_name = {recipe.name: recipe for recipe in recipes}
    swept = [(by_name[name], entry) for name, entry in results.items()]
    return "\n".join([*head(swept), *families(swept), *partly(swept), *proofs(swept)]) + "\n"


def head(swept: Sequence[tuple[Recipe, Any]]) -> Iterator[str]:
    trials = [trial for _, entry in swept for trial in entry["trials"]]
    planted = [mutant for _, entry in swept for mutant in entry["mutants"]]
    by = Counter(mutant["by"] for mutant in planted if mutant["caught"])
    silent = [m for m in planted if not m["telling"] and not m["caught"]]
    missed = [m for m in planted if m["telling"] and not m["caught"]]
    passed = {t["sample"] for t in trials} - {t["sample"] for t in trials if not t["passed"]}
    yield "# Families"
    yield ""
    yield "Made by `make sweep`; not written by hand."
    yield ""
    yield (
        f"{len(swept)} recipes serve {len({t for r, _ in swept for t in r.model_types})} model"
        f" types.  {len(passed)} of {len({t['sample'] for t in trials})} small random models pass"
        f" every check over 2 and 4 ranks, those with awkward sizes over 3 too:"
        f" {sum(t['passed'] for t in trials)} of {len(trials)} proofs, in float32, from what"
        " `save_pretrained` writes."
    )
    yield ""
    yield (
        f"{len(planted)} errors were planted in the recipes, and {sum(by.values())} caught:"
        f" {', '.join(f'{count} by {name!r}' for name, count in by.most_common())}."
        f"  {len(silent)} more, each an attribute or argument left whole that the attention"
        f" functions of these models do not read, change nothing.  {len(missed)} were missed."
    )
    yield ""


def families(swept: Sequence[tuple[Recipe, Any]]) -> Iterator[str]:
    yield "## Recipes"
    yield ""
    yield "*Largest rank*: its part of the bytes of the recipe's first sample, over 2 and 4 ranks."
    yield ""
    yield "| recipe | model types | samples | largest rank | errors caught |"
    yield "|---|---|---:|---:|---:|"
    for recipe, entry in swept:
        names = dict.fromkeys(t["sample"] for t in entry["trials"])
        caught = sum(m["caught"] for m in entry["mutants"])
        telling = caught + sum(m["telling"] and not m["caught"] for m in entry["mutants"])
        yield (
            f"| {recipe.name} | {', '.join(recipe.model_types)} | {len(names)}"
            f" | {shares(entry['trials'], next(iter(names)))} | {caught} of {telling} |"
        )
    yield ""


def shares(trials: Sequence[Any], sample: str) -> str:
    own = {t["tp_size"]: t["share"] for t in trials if t["sample"] == sample}
    return " / ".join(f"{own[size]:.0%}" for size in (2, 4) if size in own)


def partly(swept: Sequence[tuple[Recipe, Any]]) -> Iterator[str]:
    yield "## What is whole on every rank"
    yield ""
    yield (
        "Large modules that a recipe leaves whole, and why.  What else is whole is little: norms,"
        " routers, positions, and a matrix or two of a head or beside the embeddings.  The largest"
        " rank's part of the bytes is over 2 and 4 ranks, of the sample that divides least."
    )
    yield ""
    yield "| recipe | module | why | largest rank |"
    yield "|---|---|---|---:|"
    for recipe, entry in swept:
        names = list(dict.fromkeys(t["sample"] for t in entry["trials"]))
        worst = max(
            names, key=lambda n: max(t["share"] for t in entry["trials"] if t["sample"] == n)
        )
        for rule in recipe.rules:
            if rule.reason:
                told = shares(entry["trials"], worst)
                yield f"| {recipe.name} | `{rule.pattern}` | {rule.reason} | {told} |"
    yield ""


def proofs(swept: Sequence[tuple[Recipe, Any]]) -> Iterator[str]:
    yield "## Proofs"
    yield ""
    yield (
        "*Miss*: the largest difference of a layer that sums, from transformers' own, relative to"
        " its largest value.  *Error*: the largest difference of any output from the unsharded"
        " model in float64; *allowed*: four times the unsharded float32 model's own, or half a unit"
        " in the last place.  *Decoding*: 12 steps with the cache, greedy, and three beams."
    )
    yield ""
    titles = "sample", "model type", "tp", "verdict", "miss", "error", "allowed", "decoding"
    yield f"| {' | '.join(titles)} | largest rank |"
    yield "|---|---|---:|---|---:|---:|---:|---|---:|"
    notes: dict[str, str] = {}
    for _, entry in swept:
        for trial in entry["trials"]:
            numbers = trial["numerics"]
            verdict = "passed" if trial["passed"] else f"FAILED {trial['fault'][:80]}"
            error, allowed = (numbers.get(k, {}).get("max") for k in ("error", "allowed"))
            mark = "\\*" if trial["apart"] else ""
            notes |= {trial["sample"]: trial["apart"]} if trial["apart"] else {}
            yield (
                f"| {trial['sample']}{mark} | {trial['model_type']} | {trial['tp_size']} |"
                f" {verdict} | {number(trial['masked_sum'])} | {number(error)} | {number(allowed)}"
                f" | {decoding(numbers)} | {trial['share']:.0%} |"
            )
    yield ""
    for sample, note in notes.items():
        yield f"\\* {sample}: {note}."
        yield ""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def decoding(numbers: Mapping[str, Any]) -> str:
    if "greedy" not in numbers:
        return "none"
    beams = numbers.get("beams", "not run")
    return f"{numbers['greedy']}; beams {beams}"
