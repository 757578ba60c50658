"""What the documents say is what the code has."""

import json
import re
from pathlib import Path

import click
import pytest

from shardkit import errors
from shardkit.authoring.draft.draft_all import read_records
from shardkit.authoring.draft.drafts_page import render_drafts
from shardkit.authoring.families_page import render_families
from shardkit.authoring.sweep import list_entries, list_stale, read_results
from shardkit.cli import COMMANDS, main
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.parse import KEYS, load_recipe
from shardkit.shards import encode_manifest
from shardkit.shards.manifest_json import parse_manifest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROOFS = ROOT / "recipes" / "proofs"
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
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    for parameter in (parameter for one in commands for parameter in one.params):
        if isinstance(parameter, click.Option):
            assert f"`{parameter.opts[0]}`" in row


def test_every_recipe_has_been_swept_as_it_is_and_every_proof_has_passed() -> None:
    results = read_results(PROOFS)
    recipes = [load_recipe(path) for path in list_recipe_files()]
    stale = [recipe.name for recipe in list_stale(results, recipes)]
    assert not stale, "run `shardkit recipes check --all --write --stale`"
    assert [recipe.name for recipe in recipes if not results[recipe.name].passed] == []


def test_the_page_of_families_is_what_the_sweep_found() -> None:
    recipes = [load_recipe(path) for path in list_recipe_files()]
    entries = list_entries(read_results(PROOFS), recipes)
    assert (PROOFS / "FAMILIES.md").read_text() == render_families(entries)


def test_the_page_of_drafts_is_what_the_records_say() -> None:
    records = list(read_records(PROOFS / "drafts.jsonl").values())
    assert (PROOFS / "DRAFTS.md").read_text() == render_drafts(records)


def test_the_exit_codes_are_the_errors() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    found = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.ShardkitError)
    }
    assert told == found | {0, 2, 130, 143}


def test_the_manifest_example_has_the_keys_of_a_manifest() -> None:
    golden = next((ROOT / "tests/shards/golden").glob("manifest*.json")).read_bytes()
    assert json.loads(block(README, "json")).keys() == json.loads(golden).keys()
    assert encode_manifest(parse_manifest(golden)) == golden


def test_the_recipe_example_loads(tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    path.write_text(block(RECIPES, "toml"))
    assert load_recipe(path).model_types == ("llama",)


def test_every_recipe_key_is_documented() -> None:
    told = set(re.findall(r"^\| `\[?(\w+)\]?` \|", RECIPES, re.MULTILINE))
    assert told >= KEYS


@pytest.mark.parametrize(
    "path", ["README.md", "recipes/README.md", "recipes/proofs/FAMILIES.md", "CHANGELOG.md"]
)
def test_relative_links_lead_somewhere(path: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / path).read_text()):
        if "://" not in target:
            assert (ROOT / path).parent.joinpath(target).exists(), target
