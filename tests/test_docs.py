"""What the documents say is what the code has."""

import json
import re
from pathlib import Path

import click
import pytest

from shardkit import errors
from shardkit.catalog import bundled
from shardkit.cli import COMMANDS, main
from shardkit.manifest_file import parse_manifest
from shardkit.recipe_file import KEYS, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "recipes" / "README.md").read_text()


def block(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    row = next(line for line in README.splitlines() if line.startswith(f"| `shardkit {name}"))
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert f"`{parameter.opts[0]}`" in row


def test_the_family_table_is_the_recipes() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\w, ]+) \|$", README.split("## Families")[1], re.MULTILINE)
    told = {name: tuple(types.split(", ")) for name, types in rows if name != "recipe"}
    recipes = [load_recipe(path) for path in bundled()]
    assert told == {recipe.name: recipe.model_types for recipe in recipes}


def test_the_exit_codes_are_the_errors() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    found = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.ShardkitError)
    }
    assert told == found | {0, 2, 130}


def test_the_manifest_example_has_the_keys_of_a_manifest() -> None:
    golden = next((ROOT / "tests" / "golden").glob("manifest*.json")).read_bytes()
    assert json.loads(block(README, "json")).keys() == json.loads(golden).keys()
    assert parse_manifest(golden).data == golden


def test_the_recipe_example_loads(tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    path.write_text(block(RECIPES, "toml"))
    assert load_recipe(path).model_types == ("llama",)


def test_every_recipe_key_is_documented() -> None:
    told = set(re.findall(r"^\| `\[?(\w+)\]?` \|", RECIPES, re.MULTILINE))
    assert told >= KEYS


@pytest.mark.parametrize("path", ["README.md", "recipes/README.md", "CHANGELOG.md"])
def test_relative_links_lead_somewhere(path: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / path).read_text()):
        if "://" not in target:
            assert (ROOT / path).parent.joinpath(target).exists(), target
