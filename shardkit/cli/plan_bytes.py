"""What `split`, `reshard` and `plan` show of a plan's bytes."""

from typing import Any

from shardkit.cli.output import format_bytes, group_ranks, print_line
from shardkit.planning import Imbalance, Plan, PlanSummary, describe_units


def plan_bytes_to_json(summary: PlanSummary) -> dict[str, Any]:
    """A plan's bytes as JSON values: exact integers, and one ratio."""
    return {
        "tp_size": summary.plan.tp_size,
        "expert_parallel": summary.plan.is_expert_parallel,
        "tensors": len(summary.plan.placements),
        "bytes": summary.total_bytes,
        "replicated_bytes": summary.replicated_bytes,
        "ranks": [
            {"tp_rank": tp_rank, "bytes": stored, "loaded_bytes": loaded}
            for tp_rank, (stored, loaded) in enumerate(
                zip(summary.stored_bytes, summary.loaded_bytes, strict=True)
            )
        ],
        "imbalance": _imbalance_to_json(summary.plan, summary.imbalance),
    }


def print_plan_bytes(summary: PlanSummary) -> None:
    """Bytes per rank, imbalance and replicated bytes."""
    stored, loaded = summary.stored_bytes, summary.loaded_bytes
    for ranks, nbytes in group_ranks(stored):
        print_line(f"  {ranks:<12} {nbytes:>17,} bytes   {format_bytes(nbytes)}")
    only_stored = [a - b for a, b in zip(stored, loaded, strict=True)]
    for ranks, nbytes in group_ranks(only_stored):
        if nbytes:
            verb = "keep" if "-" in ranks else "keeps"
            print_line(f"  of which {ranks} {verb} {format_bytes(nbytes)}, never loaded")
    extra = summary.replicated_bytes
    print_line(f"Replicated   {format_bytes(extra)} stored more than once ({extra:,} bytes)")
    print_line(f"Imbalance    {_describe_imbalance(summary.plan, summary.imbalance)}")


def _imbalance_to_json(plan: Plan, imbalance: Imbalance) -> dict[str, Any]:
    cause = imbalance.cause
    return {
        "largest_over_mean": round(imbalance.ratio, 6),
        "largest_rank": imbalance.largest,
        "cause": cause and {"tensor": cause.pattern, "units": describe_units(plan, cause.example)},
    }


def _describe_imbalance(plan: Plan, imbalance: Imbalance) -> str:
    if imbalance.cause is None:
        return "1.0000: every rank loads the same"
    units = describe_units(plan, imbalance.cause.example)
    return (
        f"{imbalance.ratio:.4f}: most on rank {imbalance.largest}, from {imbalance.cause.pattern}"
        f" ({units} over {plan.tp_size} ranks)"
    )
