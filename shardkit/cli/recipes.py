"""`shardkit recipes`: the families there are, one recipe's text, and its proof."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from shardkit.cli.options import FOLDER, JSON, quiet_transformers
from shardkit.cli.output import format_count, print_json, print_line
from shardkit.errors import RecipeError, VerifyError
from shardkit.recipe.catalog import find_recipe_folder, list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.recipe import Recipe

NAME = click.argument("name", metavar="NAME|FILE.toml")


@click.group()
def recipes() -> None:
    """List, show, check and draft recipes.

    A recipe says how one model family is divided over ranks: one TOML file, data only.

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
    """List every recipe: its model types, what it divides, what stays whole and why."""
    found = [described(load_recipe(path)) for path in list_recipe_files()]
    if as_json:
        print_json(found)
        return
    for entry in found:
        print_line(f"{entry['recipe']}: {', '.join(entry['model_types'])}")
        print_line(f"  divides {', '.join(entry['divides'])}")
        for pattern, reason in entry["whole"].items():
            print_line(f"  whole   {pattern}: {reason}")
    types = sum(len(entry["model_types"]) for entry in found)
    print_line(f"{format_count(len(found), 'recipe')} for {format_count(types, 'model type')}")


@recipes.command()
@NAME
def show(name: str) -> None:
    """Print a recipe's file."""
    path = path_of(name)
    load_recipe(path)
    click.echo(path.read_text(), nl=False)


@recipes.command()
@NAME
@click.option(
    "--config", type=FOLDER, metavar="DIR",
    help="Check it on random weights of this small config.json, not on the bundled samples.",
)  # fmt: skip
@click.option(
    "--tp", "tp_sizes", type=click.IntRange(1, 8), multiple=True, default=(2,), show_default=True,
    metavar="N", help="The number of ranks; may be given more than once.",
)  # fmt: skip
@click.option(
    "--mutants", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    help="Also plant up to N errors in the recipe, and see each one caught.",
)  # fmt: skip
@JSON
def check(
    name: str, config: Path | None, tp_sizes: Sequence[int], mutants: int, as_json: bool
) -> None:
    """Prove a recipe on small random models.

    Every tensor has one rule. Ranks that keep only their own part, the rest zero, sum to the whole
    model, run by transformers alone. A merge is bit for bit the source. And over real ranks,
    outputs, cached decoding and beam search are the unsharded model's. Exits with 4 if not.

    \b
    Example:
      shardkit recipes check llama
      shardkit recipes check my-recipe.toml --config models/small --tp 2 --tp 4
    """
    quiet_transformers()
    from shardkit.cli.recipe_checks import run_checks, say_results

    results = run_checks(load_recipe(path_of(name)), config, tp_sizes, mutants)
    if as_json:
        print_json(results)
    else:
        say_results(results)
    if not results["passed"]:
        raise VerifyError(f"recipe {name}: not proven; see the report")


@recipes.command()
@click.argument("model", metavar="FOLDER|MODEL_TYPE")
@click.option(
    "--out", type=FOLDER, metavar="FILE.toml",
    help="Write the recipe here instead of to stdout; the file must not exist.",
)  # fmt: skip
@JSON
def draft(model: str, out: Path | None, as_json: bool) -> None:
    """Write a first recipe for a model type that has none.

    A small random model of the config in FOLDER, or of MODEL_TYPE's default config, is made and
    looked into by derivatives: which parts of which tensors meet. What is found is proven as
    `recipes check` does, and only what passes is kept; the rest is named under [whole], with what
    stood in the way. Bundled recipes are not looked at. A draft serves only who names it with
    --recipe. Exits with 4 if the draft is not proven over every number of ranks tried.

    \b
    Example:
      shardkit recipes draft models/new-architecture --out new.toml
      shardkit split models/new-architecture out --tp 4 --recipe new.toml
    """
    quiet_transformers()
    from shardkit.cli.recipe_draft import run_draft, say_draft

    made = run_draft(model, out)
    if as_json:
        print_json(made)
    else:
        say_draft(made)
    if not made["passed"]:
        raise VerifyError(f"{model}: the draft is not proven; its first lines say where it fails")


def path_of(name: str) -> Path:
    """A recipe's file: a path that ends in .toml, or a bundled one's name."""
    path = Path(name) if name.endswith(".toml") else find_recipe_folder() / f"{name}.toml"
    if not path.exists():
        raise RecipeError(f"no recipe {name!r}; `shardkit recipes list` shows the bundled ones")
    return path


def described(recipe: Recipe) -> dict[str, Any]:
    """What a recipe serves, divides and keeps whole, as JSON values."""
    units = [term.unit for rule in recipe.rules for term in rule.terms if term.unit]
    return {
        "recipe": recipe.name,
        "model_types": list(recipe.model_types),
        "divides": list(dict.fromkeys(units)),
        "whole": {rule.pattern: rule.reason for rule in recipe.rules if rule.reason},
        "notes": recipe.notes,
    }
