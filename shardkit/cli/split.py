"""`shardkit split`."""

from pathlib import Path
from time import perf_counter

import click

from shardkit.cli.options import (
    ALLOW_PICKLE,
    FOLDER,
    FORCE,
    JSON,
    RECIPE,
    RESUME,
    REVISION,
    TP,
    open_source,
    progress_bar,
)
from shardkit.cli.output import escape_text, format_bytes, format_count, print_json, print_line
from shardkit.cli.report import (
    plan_sizes_to_json,
    print_plan_sizes,
    print_split,
    split_to_json,
    suggest_commands,
)
from shardkit.convert.replaceable import shard_destination
from shardkit.convert.split import count_companion_bytes
from shardkit.convert.split import split_checkpoint as write_split
from shardkit.output.nonfinite import describe_nonfinite
from shardkit.planning.costs import generates_text
from shardkit.planning.plan import Plan, make_plan
from shardkit.planning.summary import count_stored_bytes, group_by_layout
from shardkit.recipe.catalog import find_recipe


@click.command()
@click.argument("source")
@click.argument("out", type=FOLDER)
@TP
@RECIPE
@REVISION
@FORCE
@RESUME
@ALLOW_PICKLE
@click.option(
    "--fail-on-nonfinite",
    is_flag=True,
    help="Refuse weights of which any value is NaN or infinite, instead of warning.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@JSON
def split(
    source: str,
    out: Path,
    tp_size: int,
    recipe: str | None,
    revision: str | None,
    force: bool,
    resume: bool,
    allow_pickle: bool,
    fail_on_nonfinite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Cut a checkpoint into one file per rank.

    SOURCE is a folder of safetensors files with its config.json, or a Hub id such as org/name.
    OUT is the new shard folder; it appears whole or not at all, and replaces nothing without
    --force.

    \b
    Example:
      shardkit split models/llama llama-tp4 --tp 4
      shardkit split org/name out --tp 8 --revision main --dry-run
    """
    target = shard_destination(out, force, resume)
    target.check()
    with open_source(source, revision, allow_pickle) as checkpoint:
        found = find_recipe(checkpoint.config, recipe)
        plan = make_plan(checkpoint.specs(), found, checkpoint.config, tp_size)
        total = sum(count_stored_bytes(group_by_layout(plan), tp_size))
        if dry_run:
            target.check_space(total + count_companion_bytes(checkpoint))
            _say_dry_run(plan, out, total, as_json)
            return
        started = perf_counter()
        with progress_bar(checkpoint.download_bytes + total, "split") as advance:
            manifest = write_split(
                checkpoint, plan, found, out, advance,
                force=force, resume=resume, finite=fail_on_nonfinite,
            )  # fmt: skip
        seconds = perf_counter() - started
        texts = generates_text(plan, checkpoint.config)
        warnings = [*checkpoint.warnings]
    if manifest.nonfinite:
        warnings.append(f"{describe_nonfinite(manifest.nonfinite)}; copied as they are")
    for warning in warnings:
        click.echo(f"Warning: {escape_text(warning)}", err=True)
    commands = suggest_commands(out, tp_size, source, texts, allow_pickle)
    if as_json:
        print_json(split_to_json(manifest, out, seconds, commands))
    else:
        print_split(manifest, out, seconds, commands)


def _say_dry_run(plan: Plan, out: Path, total: int, as_json: bool) -> None:
    """What would be written."""
    if as_json:
        print_json({"dry_run": True, "out": str(out), **plan_sizes_to_json(plan)})
        return
    print_line(
        f"Would write {out}: {format_count(plan.tp_size, 'rank')}, {format_bytes(total)}. Nothing was written."
    )
    print_plan_sizes(plan)
