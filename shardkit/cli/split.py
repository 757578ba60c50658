"""`shardkit split`."""

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from shardkit.cli.options import (
    ALLOW_PICKLE,
    EXPERT_PARALLEL,
    FOLDER,
    FORCE,
    JSON,
    MAX_MEMORY,
    RECIPE,
    RESUME,
    REVISION,
    TP,
    progress_bar,
)
from shardkit.cli.output import format_bytes, format_count, print_json, print_line
from shardkit.cli.plan_bytes import plan_bytes_to_json, print_plan_bytes
from shardkit.cli.split_output import show_split
from shardkit.convert import split as split_source
from shardkit.planning import Plan, summarize_plan


@click.command()
@click.argument("source")
@click.argument("out", type=FOLDER)
@TP
@EXPERT_PARALLEL
@RECIPE
@REVISION
@FORCE
@RESUME
@MAX_MEMORY
@ALLOW_PICKLE
@click.option(
    "--fail-on-nonfinite",
    is_flag=True,
    help="Fail if any weight is NaN or infinite, instead of warning.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@JSON
def split(
    source: str,
    out: Path,
    tp_size: int,
    allow_pickle: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Split a checkpoint into one file per rank.

    SOURCE is a folder of safetensors files with its config.json, or a Hub id such as org/name.
    OUT is the new shard folder. It appears complete or not at all, and nothing is replaced without
    --force.

    \b
    Example:
      shardkit split Qwen/Qwen3-0.6B qwen-tp2 --tp 2
      shardkit split models/llama llama-tp4 --tp 4 --dry-run
    """
    started = perf_counter()
    with progress_bar("split") as progress:
        result = split_source(
            source,
            out,
            tp_size,
            allow_pickle=allow_pickle,
            dry_run=dry_run,
            progress=progress,
            **options,
        )
    if dry_run:
        _show_dry_run(result.plan, out, as_json)
    else:
        show_split(result, perf_counter() - started, as_json, source, allow_pickle)


def _show_dry_run(plan: Plan, out: Path, as_json: bool) -> None:
    """What would be written."""
    summary = summarize_plan(plan)
    if as_json:
        print_json({"dry_run": True, "out": str(out), **plan_bytes_to_json(summary)})
        return
    ranks, size = format_count(plan.tp_size, "rank"), format_bytes(sum(summary.stored_bytes))
    print_line(f"Would write {out}: {ranks}, {size}. Nothing was written.")
    print_plan_bytes(summary)
