"""The page of all families: what each recipe is for, and how it was proven."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardkit.authoring.publishing import format_table, name_layout
from shardkit.authoring.served import render_served
from shardkit.recipe.recipe import Recipe

Entry = tuple[Recipe, Mapping[str, Any]]  # a recipe and its stored results


def render_families(
    entries: Sequence[Entry],
    omissions: Mapping[str, str],
    served: Sequence[Mapping[str, Any]],
    formats: Mapping[str, int],
    batching: Mapping[str, str],
    blocks: Mapping[str, str],
) -> str:
    """The page in Markdown.

    Args:
        entries: The recipes and their results.
        omissions: Model types without a recipe, and why.
        served: The plans of the checkpoints that are most served.
        formats: How many proofs each quantized format has, by its title.
        batching: How many samples of each recipe can share a batch, or why none can.
        blocks: Of how many verdicts on each recipe blocks and whole models are agreed.
    """
    proofs = [proof for _, entry in entries for proof in entry["proofs"]]
    sections = (
        _render_head(entries),
        render_served(served, proofs, formats),
        _render_recipes(entries, batching, blocks),
        _render_omissions(omissions),
        _render_replicated(entries),
        _render_proofs(entries),
    )
    return "\n".join(line for section in sections for line in section) + "\n"


def _render_head(entries: Sequence[Entry]) -> Iterator[str]:
    proofs = [proof for _, entry in entries for proof in entry["proofs"]]
    samples = {proof["sample"] for proof in proofs}
    failed = {proof["sample"] for proof in proofs if not proof["passed"]}
    model_types = {name for recipe, _ in entries for name in recipe.model_types}
    yield "# Families"
    yield ""
    yield "Written by `make sweep` (`shardkit recipes check --all --write`); do not edit."
    yield ""
    yield (
        f"{len(entries)} recipes support {len(model_types)} model types."
        f" {len(samples - failed)} of {len(samples)} small random models pass every check over 2"
        " and 4 ranks, and those with sizes that divide unevenly over 3, too:"
        f" {sum(proof['passed'] for proof in proofs)} of {len(proofs)} proofs, in float32, from"
        " checkpoints that `save_pretrained` writes."
        f" In {sum(map(_is_expert_parallel, proofs))} of them each rank has whole experts (*ep*)."
    )
    yield ""
    yield _summarize_mutants([mutant for _, entry in entries for mutant in entry["mutants"]])
    yield ""
    if forms := [forms for _, entry in entries for forms in entry["forms"]]:
        yield _summarize_forms(forms)
        yield ""


def _summarize_mutants(mutants: Sequence[Mapping[str, Any]]) -> str:
    by_check = Counter(m["detected_by"] for m in mutants if m["detected"])
    checks = ", ".join(f"{count} by {name!r}" for name, count in by_check.most_common())
    undetected = [mutant for mutant in mutants if not mutant["detected"]]
    missed = sum(mutant["must_be_detected"] for mutant in undetected)
    return (
        f"{len(mutants)} faults were injected into the recipes (mutants), one at a time, and"
        f" {sum(by_check.values())} were detected: {checks}. {len(undetected) - missed} others"
        " change nothing: each leaves an attribute or argument whole that the attention functions"
        " of these models do not read, or leaves out a rule of tensors that another one places"
        f" alike. {missed} were missed."
    )


def _summarize_forms(types: Sequence[Mapping[str, Any]]) -> str:
    tried, loaded = (sum(forms[key] for forms in types) for key in ("tried", "loaded"))
    faults = sum(len(forms["faults"]) for forms in types)
    unrun = {reason.split(":")[0] for forms in types for reason in forms.get("not_run", ())}
    rest = (
        f" {len(unrun)} classes do not run on these inputs in transformers either, and their forms"
        f" were only split and loaded: {', '.join(sorted(unrun))}."
    )
    return (
        f"The first model of each of {len(types)} types was saved as every class that transformers"
        " has for the type, and loaded as every other and as one that does not exist: as saved,"
        " under the older names of its conversion table, without the base model's prefix, and with"
        f" ties, buffers and other classes' heads stored too. Of these {tried} forms transformers"
        f" loads {loaded} without a missing tensor, and {loaded - faults} of those are split, run"
        f" and compute the same.{rest if unrun else ''}"
    )


def _render_recipes(
    entries: Sequence[Entry], batching: Mapping[str, str], blocks: Mapping[str, str]
) -> Iterator[str]:
    yield "## Recipes"
    yield ""
    yield (
        "*Largest rank*: its share of the bytes of the recipe's first sample, over 2 and 4 ranks."
        " *Share a batch*: of how many samples requests join and leave a running batch, and get,"
        " token for token, what `generate` gives each alone, over 2 and 4 ranks, and over 3"
        " if the sample was run over as many (by `shardkit recipes check --batching --write`); or"
        " why that is not offered."
        " *Same by blocks*: how many verifications block by block, with ranks in turns, came to the"
        " verdict of whole models on real ranks, and blamed the same tensors: of every sample over"
        " 2 ranks, as it is and with injected faults (`shardkit recipes check --blocks --write`);"
        " *by blocks alone*: wrong parts of what no output depends on, or of a sample with a"
        " limitation (*Proofs*)."
    )
    yield ""
    titles = (
        "recipe", "model types", "samples:", "largest rank:", "mutants detected:", "forms run:",
        "share a batch:", "same by blocks:",
    )  # fmt: skip
    yield from format_table(
        titles,
        [
            (*_recipe_row(r, entry), *(column.get(r.name, "") for column in (batching, blocks)))
            for r, entry in entries
        ],
    )
    yield ""


def _render_omissions(omissions: Mapping[str, str]) -> Iterator[str]:
    yield "## Left out"
    yield ""
    yield "Model types of transformers that generate, and have no recipe."
    yield ""
    yield from format_table(("model type", "why"), list(omissions.items()))
    yield ""


def _recipe_row(recipe: Recipe, entry: Mapping[str, Any]) -> tuple[object, ...]:
    samples = _list_samples(entry)
    detected = sum(mutant["detected"] for mutant in entry["mutants"])
    missed = sum(m["must_be_detected"] and not m["detected"] for m in entry["mutants"])
    return (
        recipe.name,
        ", ".join(recipe.model_types),
        len(samples),
        _format_shares(entry["proofs"], samples[0]),
        f"{detected} of {detected + missed}",
        _count_forms(entry["forms"]),
    )


def _count_forms(types: Sequence[Mapping[str, Any]]) -> str:
    loaded = sum(forms["loaded"] for forms in types)
    faults = sum(len(forms["faults"]) for forms in types)
    return f"{loaded - faults} of {loaded}" if types else ""


def _is_expert_parallel(proof: Mapping[str, Any]) -> bool:
    return bool(proof.get("expert_parallel"))


def _list_samples(entry: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(proof["sample"] for proof in entry["proofs"]))


def _format_shares(proofs: Sequence[Mapping[str, Any]], sample: str) -> str:
    own = [p for p in proofs if p["sample"] == sample and not _is_expert_parallel(p)]
    shares = {p["tp_size"]: p["share"] for p in own}
    return " / ".join(f"{shares[size]:.0%}" for size in (2, 4) if size in shares)


def _render_replicated(entries: Sequence[Entry]) -> Iterator[str]:
    yield "## What every rank holds whole"
    yield ""
    yield (
        "The large modules that a recipe replicates, and why. Anything else that is replicated is"
        " small: norms, routers, positions, and a matrix or two of a head or next to the"
        " embeddings. *Largest rank*: its share of the bytes over 2 and 4 ranks, of the sample that"
        " divides least."
    )
    yield ""
    titles = ("recipe", "module", "why", "largest rank:")
    rows = []
    for recipe, entry in entries:
        shares = _format_shares(entry["proofs"], _least_divided(entry["proofs"]))
        rows += [
            (recipe.name, f"`{rule.pattern}`", rule.reason, shares)
            for rule in recipe.rules
            if rule.reason
        ]
    yield from format_table(titles, rows)
    yield ""


def _least_divided(proofs: Sequence[Mapping[str, Any]]) -> str:
    """The first sample with the largest share on one rank."""
    shared = [proof for proof in proofs if not _is_expert_parallel(proof)]
    largest = max(shared, key=lambda proof: float(proof["share"]))
    return str(largest["sample"])


def _render_proofs(entries: Sequence[Entry]) -> Iterator[str]:
    yield "## Proofs"
    yield ""
    yield (
        "*Masked sum*: the largest difference of a layer that is summed over the ranks from"
        " transformers' own, relative to its largest value. *Error*: the largest difference of any"
        " output from the unsharded model in float64; *allowed*: four times the unsharded float32"
        " model's own, or half a unit in the last place. *Decoding*: 12 steps with the cache,"
        " greedy, and with three beams."
    )
    yield ""
    titles = (
        "sample", "model type", "tp:", "verdict", "masked sum:", "error:", "allowed:", "decoding",
        "largest rank:",
    )  # fmt: skip
    proofs = [proof for _, entry in entries for proof in entry["proofs"]]
    yield from format_table(titles, map(_proof_row, proofs))
    yield ""
    yield from _render_usage([proof for proof in proofs if proof.get("plan")])
    limitations = {p["sample"]: p["limitation"] for p in proofs if p["limitation"]}
    for sample, limitation in limitations.items():
        yield f"\\* {sample}: {limitation}."
        yield ""


def _render_usage(proofs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was measured of each sample, as the plan predicts it; nothing of older results."""
    if not proofs:
        return
    yield "## As planned"
    yield ""
    yield (
        "Measured on rank 0, and on every rank equal to what `shardkit plan` predicts,"
        " or else marked unknown: all-reduces and all-gathers for each generated token, or of a"
        " forward pass; bytes that one token adds to the KV cache; bytes of the weights."
    )
    yield ""
    titles = ("sample", "tp:", "collectives:", "cache bytes:", "weight bytes:")
    yield from format_table(titles, map(_usage_row, proofs))
    yield ""


def _usage_row(proof: Mapping[str, Any]) -> tuple[object, ...]:
    plan = proof["plan"]
    counts = [
        plan.get(f"all_{kind}s per token", plan.get(f"all_{kind}s per prompt"))
        for kind in ("reduce", "gather")
    ]
    return (
        proof["sample"],
        name_layout(proof),
        " + ".join(_format_usage(count) for count in counts if count),
        _format_usage(plan.get("cache bytes")),
        _format_usage(plan.get("weight bytes")),
    )


def _format_usage(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    unknown = " (unknown)" if isinstance(figure["predicted"], str) else ""
    return f"{figure['measured'][0]:,}{unknown}"


def _proof_row(proof: Mapping[str, Any]) -> tuple[object, ...]:
    numbers = proof["numerics"]
    return (
        proof["sample"] + ("\\*" if proof["limitation"] else ""),
        proof["model_type"],
        name_layout(proof),
        "passed" if proof["passed"] else f"FAILED {proof['fault'][:80]}",
        _format_number(proof["masked_sum"]),
        _format_number(numbers.get("error", {}).get("max")),
        _format_number(numbers.get("allowed", {}).get("max")),
        _describe_decoding(numbers),
        f"{proof['share']:.0%}",
    )


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _describe_decoding(numbers: Mapping[str, Any]) -> str:
    if "greedy" not in numbers:
        return "none"
    return f"{numbers['greedy']}; beams {numbers.get('beams', 'not run')}"
