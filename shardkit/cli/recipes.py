"""`shardkit recipes`: list, show, check and draft recipes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from shardkit.cli.options import FOLDER, JSON, end_on_sigterm, quiet_transformers
from shardkit.cli.output import format_count, print_json, print_line
from shardkit.errors import RecipeError, VerifyError
from shardkit.recipe.catalog import find_recipe_folder, list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.recipe import Recipe

SECONDS_PER_TYPE = 300.0
BY_MODEL_TYPE = "by its model_type"


@click.group()
def recipes() -> None:
    """List, show, check and draft recipes.

    A recipe says how one model family is sharded: one TOML file, data only.

    \b
    Example:
      shardkit recipes list
      shardkit recipes show llama
      shardkit recipes check my-recipe.toml --config models/small
      shardkit recipes draft models/new-architecture
    """


@recipes.command("list")
@JSON
def list_recipes(as_json: bool) -> None:
    """List the recipes: their model types, what they divide, what they replicate and why."""
    entries = [describe_recipe(load_recipe(path)) for path in list_recipe_files()]
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        print_line(f"{entry['recipe']}: {', '.join(entry['model_types'])}")
        if entry["divides"]:
            print_line(f"  divides    {', '.join(entry['divides'])}")
        for field, part in entry["parts"].items():
            print_line(f"  composes   {field}, under {part['module']}: {part['recipe']}")
        for pattern, reason in entry["replicated"].items():
            print_line(f"  replicates {pattern}: {reason}")
    types = sum(len(entry["model_types"]) for entry in entries)
    print_line(f"{format_count(len(entries), 'recipe')} for {format_count(types, 'model type')}")


@recipes.command()
@click.argument("name", metavar="NAME|FILE.toml")
def show(name: str) -> None:
    """Print a recipe's file."""
    path = find_recipe_file(name)
    load_recipe(path)
    click.echo(path.read_text(), nl=False)


@recipes.command()
@click.argument("names", metavar="[NAME|FILE.toml]...", nargs=-1)
@click.option("--all", "check_all", is_flag=True, help="Check every bundled recipe.")
@click.option(
    "--formats", "others", flag_value="formats",
    help="With --write, check every quantized format instead of recipes.",
)  # fmt: skip
@click.option(
    "--batching", "others", flag_value="batching",
    help="With --write, check for every recipe that requests which share a batch get what each"
    " would get alone.",
)  # fmt: skip
@click.option(
    "--blocks", "others", flag_value="blocks",
    help="With --write, check for every recipe that verification block by block comes to the"
    " verdict of whole models, on right shards and on wrong ones.",
)  # fmt: skip
@click.option(
    "--config", type=FOLDER, metavar="DIR",
    help="Check on random weights of the small config.json in DIR, not on the bundled samples.",
)  # fmt: skip
@click.option(
    "--tp", "tp_sizes", type=click.IntRange(1, 8), multiple=True, metavar="N",
    help="Number of ranks; may be given more than once (default: 2).",
)  # fmt: skip
@click.option(
    "--mutants", type=click.IntRange(min=0), metavar="N",
    help="Also inject up to N faults, each into a copy of the recipe, and check that every one is"
    " detected (default: 0).",
)  # fmt: skip
@click.option(
    "--write", is_flag=True,
    help="Check over 2 and 4 ranks with 16 mutants, and publish the results in recipes/proofs. Only"
    " in a checkout of shardkit, for bundled recipes.",
)  # fmt: skip
@click.option(
    "--stale", is_flag=True,
    help="With --write, leave out recipes whose published results are up to date.",
)  # fmt: skip
@JSON
def check(
    names: Sequence[str],
    check_all: bool,
    others: str | None,
    config: Path | None,
    tp_sizes: Sequence[int],
    mutants: int | None,
    write: bool,
    stale: bool,
    as_json: bool,
) -> None:
    """Prove recipes on small random models.

    A recipe passes if every tensor has one rule; if ranks that keep only their own part, the rest
    zero, sum to the unsharded model, run by transformers alone; if a merge gives back the source
    bit for bit; if over real ranks the outputs, cached decoding and beam search equal the
    unsharded model's; and if the ranks use what `plan` predicts. Exits with 4 if one does not.

    \b
    Example:
      shardkit recipes check llama
      shardkit recipes check my-recipe.toml --config models/small --tp 2 --tp 4
    """
    if others and (names or check_all or not write):
        raise click.UsageError(f"--{others} needs --write, and no NAME or --all")
    if bool(names) + check_all + bool(others) != 1:
        raise click.UsageError("give the NAME of a recipe, or --all")
    if write and (config or tp_sizes or mutants is not None or as_json):
        raise click.UsageError(
            "--write cannot be combined with --config, --tp, --mutants or --json"
        )
    if stale and not write:
        raise click.UsageError("--stale needs --write")
    quiet_transformers()
    if others:
        _sweep_others(others, stale)
        return
    if write:
        _sweep(names, stale)
        return
    files = [find_recipe_file(name) for name in names] or list_recipe_files()
    _check_files(files, config, tp_sizes or (2,), mutants or 0, as_json)


@recipes.command()
@click.argument("model", metavar="[FOLDER|MODEL_TYPE]", required=False)
@click.option(
    "--all", "draft_all", is_flag=True,
    help="Draft every generative model type of transformers, one after another, to measure how"
    " many drafts pass. Resumes if it was interrupted.",
)  # fmt: skip
@click.option(
    "--out", type=FOLDER, metavar="FILE",
    help="Write the recipe to this new file instead of stdout. With --all: the file of results,"
    " JSON lines, with a page next to it (default: recipes/proofs of the checkout).",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N",
    help="With --all, draft at most N model types in this run.",
)  # fmt: skip
@click.option(
    "--seconds-per-type", type=click.FloatRange(min=0, min_open=True), metavar="S",
    help="With --all, count a model type as failed after S seconds (default: 300).",
)  # fmt: skip
@JSON
def draft(
    model: str | None,
    draft_all: bool,
    out: Path | None,
    limit: int | None,
    seconds_per_type: float | None,
    as_json: bool,
) -> None:
    """Write a first recipe for a model type that has none.

    Makes a small random model from the config in FOLDER, or from MODEL_TYPE's default config, and
    uses its gradients to find which slices of which weights depend on each other. Only what passes
    the checks of `recipes check` is sharded; everything else is listed under [replicated] with the
    reason. The bundled recipes are not used. A draft is used only if you pass it with --recipe.
    Exits with 4 if the draft does not pass over every number of ranks tried.

    \b
    Example:
      shardkit recipes draft models/new-architecture --out new.toml
      shardkit split models/new-architecture out --tp 4 --recipe new.toml
    """
    if (model is not None) == draft_all:
        raise click.UsageError("give a FOLDER or MODEL_TYPE, or --all")
    if not draft_all and (limit or seconds_per_type):
        raise click.UsageError("--limit and --seconds-per-type need --all")
    quiet_transformers()
    if model is None:
        _draft_all(out, limit, seconds_per_type or SECONDS_PER_TYPE, as_json)
        return
    from shardkit.cli.recipe_draft import print_draft, run_draft

    result = run_draft(model, out)
    if as_json:
        print_json(result)
    else:
        print_draft(result)
    if not result["passed"]:
        raise VerifyError(f"{model}: the draft does not pass; its first lines say where it fails")


def find_recipe_file(name: str) -> Path:
    """A recipe's file: a path that ends in .toml, or a bundled recipe's name."""
    path = Path(name) if name.endswith(".toml") else find_recipe_folder() / f"{name}.toml"
    if not path.exists():
        raise RecipeError(f"no recipe {name!r}; `shardkit recipes list` shows the bundled ones")
    return path


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The model types of a recipe, and what it divides and replicates, as JSON values."""
    units = [term.unit for rule in recipe.rules for term in rule.terms if term.unit]
    return {
        "recipe": recipe.name,
        "model_types": list(recipe.model_types),
        "divides": list(dict.fromkeys(units)),
        "parts": {
            part.config_field: {"module": part.module, "recipe": part.recipe or BY_MODEL_TYPE}
            for part in recipe.parts
        },
        "replicated": {rule.pattern: rule.reason for rule in recipe.rules if rule.reason},
        "notes": recipe.notes,
    }


def _check_files(
    files: Sequence[Path],
    config: Path | None,
    tp_sizes: Sequence[int],
    mutants: int,
    as_json: bool,
) -> None:
    """Check recipes one after another. Raises VerifyError if one does not pass."""
    from shardkit.cli.recipe_checks import print_results, run_checks

    reports = []
    for path in files:
        reports.append(run_checks(load_recipe(path), config, tp_sizes, mutants))
        if not as_json:
            print_results(reports[-1])
    if as_json:
        print_json(reports[0] if len(reports) == 1 else reports)
    if failed := [report["recipe"] for report in reports if not report["passed"]]:
        raise VerifyError(f"recipe {', '.join(failed)}: does not pass; see the report")


def _sweep(names: Sequence[str], only_stale: bool) -> None:
    """Check and publish. Raises VerifyError if a recipe does not pass."""
    from shardkit.cli.recipe_checks import run_sweep

    bundled = {path.stem for path in list_recipe_files()}
    if unknown := [name for name in names if name not in bundled]:
        raise RecipeError(f"{unknown[0]!r} is not a bundled recipe; --write is for those")
    if not run_sweep(names, only_stale):
        raise VerifyError("a recipe does not pass; see the lines above")


def _sweep_others(others: str, only_stale: bool) -> None:
    """Check formats, batching or blocks, and publish. Raises VerifyError if one does not pass."""
    from shardkit.authoring.batching_sweep import BATCHING_SWEEP
    from shardkit.authoring.block_sweep import BLOCK_SWEEP
    from shardkit.cli.recipe_checks import run_column_sweep, run_format_sweep

    sweeps: dict[str, Callable[[bool], bool]] = {
        "formats": run_format_sweep,
        "batching": partial(run_column_sweep, BATCHING_SWEEP),
        "blocks": partial(run_column_sweep, BLOCK_SWEEP),
    }
    if not sweeps[others](only_stale):
        raise VerifyError("one does not pass; see the lines above")


def _draft_all(out: Path | None, limit: int | None, seconds: float, as_json: bool) -> None:
    from shardkit.cli.recipe_draft import run_all_drafts

    end_on_sigterm()
    result = run_all_drafts(out, limit, seconds, show=not as_json)
    if as_json:
        print_json(result)
    else:
        print_line(
            f"{result['passed']} of {format_count(result['model_types'], 'model type')} pass;"
            f" see {result['page']}"
        )
