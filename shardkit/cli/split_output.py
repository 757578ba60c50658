"""What `split`, `reshard` and `plan` show of a plan's bytes, and what a split says when done."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardkit.cli.output import (
    format_bytes,
    format_count,
    format_rate,
    group_ranks,
    print_json,
    print_line,
    print_warning,
)
from shardkit.convert import SplitResult
from shardkit.planning import Imbalance, Plan, PlanSummary, describe_units, summarize_plan
from shardkit.shards import Manifest


def show_split(
    result: SplitResult,
    seconds: float,
    as_json: bool,
    source: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Print a finished split or reshard, its warnings on stderr, and the commands to type next."""
    for warning in result.warnings:
        print_warning(warning)
    assert result.manifest is not None
    commands = suggest_commands(
        result.out, result.plan.tp_size, source, result.generates_text, allow_pickle
    )
    if as_json:
        print_json(split_to_json(result.manifest, result.out, seconds, commands))
        return
    total = sum(rank_file.digest.size for rank_file in result.manifest.ranks)
    ranks = format_count(result.plan.tp_size, "rank")
    print_line(f"Wrote {result.out}: {ranks}, {format_rate(total, seconds)}")
    print_plan_bytes(summarize_plan(result.plan))
    print_line()
    print_line("Next:")
    for command in commands:
        print_line(f"  {command}")


def split_to_json(
    manifest: Manifest, out: Path, seconds: float, commands: Sequence[str]
) -> dict[str, Any]:
    """A finished split as JSON values."""
    total = sum(rank_file.digest.size for rank_file in manifest.ranks)
    return {
        "out": str(out),
        "split_id": manifest.split_id,
        "recipe": manifest.recipe,
        "bytes_written": total,
        "seconds": round(seconds, 3),
        "gb_per_second": round(total / seconds / 1e9, 3),
        "files": [
            {"name": file.name, "size": file.digest.size, "sha256": file.digest.sha256}
            for file in manifest.ranks
        ],
        "nonfinite": manifest.nonfinite,
        **plan_bytes_to_json(summarize_plan(manifest.plan)),
        "next": list(commands),
    }


def suggest_commands(
    out: Path, tp_size: int, source: str | None, generates_text: bool, allow_pickle: bool = False
) -> list[str]:
    """What to type after a split: verify it, try it, serve it."""
    folder = shlex.quote(str(out))
    against = f" --against {shlex.quote(source)}" if source else ""
    against += " --allow-pickle" if allow_pickle else ""
    commands = [f"shardkit verify {folder}{against}"]
    if generates_text:
        commands.append(f'shardkit generate {folder} "Once upon a time"')
    return [*commands, f"torchrun --nproc-per-node {tp_size} your_server.py"]


def plan_bytes_to_json(summary: PlanSummary) -> dict[str, Any]:
    """A plan's bytes as JSON values: exact integers, and one ratio."""
    return {
        "tp_size": summary.plan.tp_size,
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
