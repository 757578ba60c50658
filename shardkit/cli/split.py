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
from shardkit.cli.output import plural, printable, say, say_json, size
from shardkit.cli.report import next_commands, plan_sizes, say_plan_sizes, say_written, written
from shardkit.convert.replaceable import shard_target
from shardkit.convert.split import beside
from shardkit.convert.split import split as write_split
from shardkit.output.nonfinite import nonfinite_text
from shardkit.planning.costs import generates
from shardkit.planning.plan import Plan, make_plan
from shardkit.planning.summary import groups, stored_bytes
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
    target = shard_target(out, force, resume)
    target.check()
    with open_source(source, revision, allow_pickle) as checkpoint:
        found = find_recipe(checkpoint.config, recipe)
        plan = make_plan(checkpoint.specs(), found, checkpoint.config, tp_size)
        total = sum(stored_bytes(groups(plan), tp_size))
        if dry_run:
            target.check_space(total + beside(checkpoint))
            _say_dry_run(plan, out, total, as_json)
            return
        started = perf_counter()
        with progress_bar(checkpoint.downloaded + total, "split") as advance:
            manifest = write_split(
                checkpoint, plan, found, out, advance,
                force=force, resume=resume, finite=fail_on_nonfinite,
            )  # fmt: skip
        seconds = perf_counter() - started
        texts = generates(plan, checkpoint.config)
        warnings = [*checkpoint.warnings]
    if manifest.nonfinite:
        warnings.append(f"{nonfinite_text(manifest.nonfinite)}; copied as they are")
    for warning in warnings:
        click.echo(f"Warning: {printable(warning)}", err=True)
    commands = next_commands(out, tp_size, source, texts, allow_pickle)
    if as_json:
        say_json(written(manifest, out, seconds, commands))
    else:
        say_written(manifest, out, seconds, commands)


def _say_dry_run(plan: Plan, out: Path, total: int, as_json: bool) -> None:
    """What would be written."""
    if as_json:
        say_json({"dry_run": True, "out": str(out), **plan_sizes(plan)})
        return
    say(f"Would write {out}: {plural(plan.tp_size, 'rank')}, {size(total)}. Nothing was written.")
    say_plan_sizes(plan)
