"""What a split or a reshard says when it is done."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardkit.cli.output import format_bytes, format_count, group_ranks, print_line
from shardkit.planning.plan import Plan
from shardkit.planning.summary import (
    Imbalance,
    TensorGroup,
    count_loaded_bytes,
    count_replicated_bytes,
    count_stored_bytes,
    count_total_bytes,
    describe_units,
    group_by_layout,
    measure_imbalance,
)
from shardkit.shards.manifest import Manifest


def split_to_json(
    manifest: Manifest, out: Path, seconds: float, commands: Sequence[str]
) -> dict[str, Any]:
    """A finished split as JSON values."""
    total = sum(rank.digest.size for rank in manifest.ranks)
    return {
        "out": str(out),
        "split_id": manifest.split_id,
        "recipe": manifest.recipe,
        "bytes_written": total,
        "seconds": round(seconds, 3),
        "gb_per_second": round(total / seconds / 1e9, 3),
        "files": [
            {"name": rank.name, "size": rank.digest.size, "sha256": rank.digest.sha256}
            for rank in manifest.ranks
        ],
        "nonfinite": manifest.nonfinite,
        **plan_sizes_to_json(manifest.plan),
        "next": list(commands),
    }


def print_split(manifest: Manifest, out: Path, seconds: float, commands: Sequence[str]) -> None:
    """A finished split, and the commands to type next."""
    total = sum(rank.digest.size for rank in manifest.ranks)
    print_line(
        f"Wrote {out}: {format_count(manifest.tp_size, 'rank')}, {format_bytes(total)} in {seconds:.1f} s"
        f" ({total / seconds / 1e9:.2f} GB/s)"
    )
    print_plan_sizes(manifest.plan)
    print_line()
    print_line("Next:")
    for command in commands:
        print_line(f"  {command}")


def suggest_commands(
    out: Path, tp_size: int, source: str | None, generates: bool, pickled: bool = False
) -> list[str]:
    """What to type after a split: prove it, try it, serve it."""
    folder = shlex.quote(str(out))
    against = f" --against {shlex.quote(source)}" if source else ""
    against += " --allow-pickle" if pickled else ""
    commands = [f"shardkit verify {folder}{against}"]
    if generates:
        commands.append(f'shardkit generate {folder} "Once upon a time"')
    return [*commands, f"torchrun --nproc-per-node {tp_size} your_server.py"]


def plan_sizes_to_json(plan: Plan) -> dict[str, Any]:
    """A plan's bytes as JSON values: exact integers, and one ratio."""
    parts = group_by_layout(plan)
    loaded = count_loaded_bytes(parts, plan.tp_size)
    return {
        "tp_size": plan.tp_size,
        "tensors": len(plan.placements),
        "bytes": count_total_bytes(plan),
        "replicated_bytes": count_replicated_bytes(plan, parts),
        "ranks": [
            {"tp_rank": tp_rank, "bytes": stored, "loaded_bytes": loaded[tp_rank]}
            for tp_rank, stored in enumerate(count_stored_bytes(parts, plan.tp_size))
        ],
        "imbalance": _imbalance_json(plan, measure_imbalance(plan, parts)),
    }


def print_plan_sizes(plan: Plan) -> None:
    """Bytes per rank, imbalance and replicated bytes."""
    parts = group_by_layout(plan)
    stored, loaded = (
        count_stored_bytes(parts, plan.tp_size),
        count_loaded_bytes(parts, plan.tp_size),
    )
    for ranks, nbytes in group_ranks(stored):
        print_line(f"  {ranks:<12} {nbytes:>17,} bytes   {format_bytes(nbytes)}")
    if stored != loaded:
        print_line(
            f"  of which rank 0 keeps {format_bytes(stored[0] - loaded[0])} for a merge, never loaded"
        )
    extra = count_replicated_bytes(plan, parts)
    print_line(f"Replicated   {format_bytes(extra)} stored more than once ({extra:,} bytes)")
    print_line(f"Imbalance    {_imbalance_text(plan, measure_imbalance(plan, parts))}")


def _imbalance_json(plan: Plan, found: Imbalance) -> dict[str, Any]:
    return {
        "largest_over_mean": round(found.ratio, 6),
        "largest_rank": found.largest,
        "cause": found.cause
        and {"tensor": found.cause.pattern, "units": _units(plan, found.cause)},
    }


def _imbalance_text(plan: Plan, found: Imbalance) -> str:
    if found.cause is None:
        return "1.0000: every rank loads as much"
    return (
        f"{found.ratio:.4f}: most on rank {found.largest}, from {found.cause.pattern}"
        f" ({_units(plan, found.cause)} over {plan.tp_size} ranks)"
    )


def _units(plan: Plan, group: TensorGroup) -> str:
    return describe_units(plan, group.example)
