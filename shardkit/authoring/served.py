"""The checkpoints that are most served over several GPUs: what can be done with each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.authoring.publishing import format_table
from shardkit.errors import LayoutError, ShardkitError
from shardkit.planning import Plan, make_plan, summarize_plan
from shardkit.recipe import find_recipe
from shardkit.tensor import TensorSpec

SERVED = "served.json"
TP_SIZES = (8, 16)
DENSE = "dense"  # a model without experts


def plan_served(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> dict[str, Any]:
    """The plans of a checkpoint as it is published, over 8 and 16 ranks, as JSON values.

    Args:
        specs: Its tensors.
        config: Its config.json.
    """
    entry: dict[str, Any] = {"model_type": str(config.get("model_type")), "refusal": ""}
    try:
        recipe = find_recipe(config)
        plan = make_plan(specs, recipe, config, 1)
    except ShardkitError as refusal:
        return {**entry, "refusal": str(refusal)}
    entry["formats"] = [scheme.format.title for scheme in plan.grouping.schemes]
    entry |= {f"tp{size}": _describe_over(plan, size) for size in TP_SIZES}
    try:
        whole = make_plan(specs, recipe, config, 1, expert_parallel=True)
    except LayoutError:
        return entry | dict.fromkeys((f"ep{size}" for size in TP_SIZES), DENSE)
    return entry | {f"ep{size}": _describe_over(whole, size) for size in TP_SIZES}


def _describe_over(plan: Plan, size: int) -> str:
    """A plan over another number of ranks in a few words, or why there is none."""
    try:
        return describe_plan(plan.with_tp_size(size))
    except LayoutError as refusal:
        return f"refused: {refusal}"


def describe_plan(plan: Plan) -> str:
    """The largest rank's bytes, and its ratio to the mean if that is not 1."""
    summary = summarize_plan(plan)
    ratio = f" ({summary.imbalance.ratio:.2f})" if summary.imbalance.ratio >= 1.005 else ""
    return f"{max(summary.loaded_bytes) / 1e9:.1f} GB{ratio}"


def read_served(folder: Path) -> list[dict[str, Any]]:
    """The stored plans; none if there are none yet."""
    path = folder / SERVED
    return json.loads(path.read_text()) if path.exists() else []


def render_served(
    rows: Sequence[Mapping[str, Any]],
    proofs: Sequence[Mapping[str, Any]],
    proven_formats: Mapping[str, int],
) -> Iterator[str]:
    """A section of a page in Markdown.

    Args:
        rows: The stored plans.
        proofs: Those of every recipe.
        proven_formats: How many proofs each format has, by its title.
    """
    if not rows:
        return
    planned = sum(not _list_missing(row) for row in rows)
    yield "## The checkpoints that are most served"
    yield ""
    yield (
        f"As they are published, or if that is not known as the class's defaults and the published"
        f" config have them: {planned} of {len(rows)} are planned over 8 and over 16 ranks, one way"
        " or the other."
        " *tp*, *ep*: the largest rank's bytes over 8 and 16 ranks, with its ratio to the mean if"
        " that is not 1; with whole experts on each. *Run and verified*: proofs of small models of"
        " the type (split, merged, run, compared), and of small models in its formats."
    )
    yield ""
    titles = ("checkpoint", "formats", "tp 8 / 16", "ep 8 / 16", "run and verified:", "missing")
    yield from format_table(titles, [_make_row(row, proofs, proven_formats) for row in rows])
    yield ""


def _make_row(
    row: Mapping[str, Any], proofs: Sequence[Mapping[str, Any]], formats: Mapping[str, int]
) -> tuple[str, ...]:
    if row["refusal"]:
        return row["checkpoint"], "", "", "", "", row["refusal"]
    own = [p for p in proofs if p["model_type"] == row["model_type"] and p["passed"]]
    counts = [f"{len(own)}", *(f"{formats.get(title, 0)} in {title}" for title in row["formats"])]
    cells = (" / ".join(_shorten(row[f"{key}{n}"]) for n in TP_SIZES) for key in ("tp", "ep"))
    titles = ", ".join(row["formats"]) or "16 bits"
    missing = "; ".join(_list_missing(row))
    return row["checkpoint"], titles, *cells, ", ".join(counts), missing


def _list_missing(row: Mapping[str, Any]) -> list[str]:
    """What cannot be done with a checkpoint, in words."""
    if row["refusal"]:
        return [row["refusal"]]
    whole = {size: _is_refused(row[f"ep{size}"]) or row[f"ep{size}"] == DENSE for size in TP_SIZES}
    cells = [row[f"tp{size}"] for size in TP_SIZES if whole[size]]
    return list(
        dict.fromkeys(cell.removeprefix("refused: ") for cell in cells if _is_refused(cell))
    )


def _shorten(cell: str) -> str:
    return "refused" if _is_refused(cell) else cell


def _is_refused(cell: str) -> bool:
    return cell.startswith("refused")
