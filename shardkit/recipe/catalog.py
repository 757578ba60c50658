"""The bundled recipes, and which of them matches a checkpoint."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from shardkit.errors import RecipeError
from shardkit.layout.style import REPLICATE
from shardkit.recipe.counts import matches_config
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.recipe import Recipe
from shardkit.recipe.toml_values import expect_strings

HERE = Path(__file__).parents[1]


def find_recipe_folder() -> Path:
    """The bundled recipes: inside an installed package, beside it in a checkout."""
    installed = HERE / "recipes"
    return installed if installed.is_dir() else HERE.parent / "recipes"


def list_recipe_files() -> list[Path]:
    """Every bundled recipe file, by name."""
    return sorted(find_recipe_folder().glob("*.toml"))


@cache
def load_heads() -> tuple[str, ...]:
    """The heads that any model may have, which are replicated. Raises RecipeError."""
    path = find_recipe_folder() / "shared" / "heads.toml"
    return expect_strings(tomllib.loads(path.read_text(encoding="utf-8")), REPLICATE.name)


def is_bundled(recipe: Recipe) -> bool:
    """Whether a recipe is a bundled file, and not a changed copy of one."""
    path = find_recipe_folder() / f"{recipe.name}.toml"
    return path.is_file() and load_recipe(path).sha256 == recipe.sha256


def find_recipe(config: Mapping[str, Any], name_or_path: str | None = None) -> Recipe:
    """The recipe for a config's model_type, or the one asked for by name or path.

    Raises RecipeError if there is none: no layout is ever guessed.
    """
    model_type = config.get("model_type")
    if name_or_path is not None:
        path = Path(name_or_path)
        if path.suffix != ".toml":
            path = find_recipe_folder() / f"{name_or_path}.toml"
        return load_recipe(path)
    mentioned = [
        p for p in list_recipe_files() if f'"{model_type}"' in p.read_text(encoding="utf-8")
    ]
    candidates = [
        recipe for recipe in map(load_recipe, mentioned) if model_type in recipe.model_types
    ]
    matching = [recipe for recipe in candidates if matches_config(recipe, config)]
    if len(matching) == 1:
        return matching[0]
    if candidates:
        names = ", ".join(recipe.name for recipe in matching or candidates)
        what = "more than one of them matches" if matching else "none of them matches"
        raise RecipeError(
            f"model_type {model_type!r} has the recipes {names}, but {what} this config;"
            " choose one with --recipe NAME"
        )
    raise RecipeError(
        f"model_type {model_type!r}: no recipe for it (`shardkit recipes list` shows those"
        " known); draft one with `shardkit recipes draft`, or write one (recipes/README.md), and"
        " pass it with --recipe FILE.toml"
    )
