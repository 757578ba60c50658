"""What the documents say is what the code has."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest

from shardkit import errors
from shardkit.authoring.draft.draft_all import list_generative_types, read_records
from shardkit.authoring.draft.drafts_page import render_drafts
from shardkit.authoring.format_samples import list_format_samples
from shardkit.authoring.format_sweep import FORMAT_RESULTS, digest_format, render_formats
from shardkit.authoring.sweep import (
    SWEEP_RESULTS,
    list_alone,
    list_stale,
    read_omissions,
    render_page,
)
from shardkit.cli import COMMANDS, main
from shardkit.layout import STYLES, Section, rank_spans
from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.parse_counts import KEYS
from shardkit.shards import encode_manifest
from shardkit.shards.manifest_json import parse_manifest
from tests.helpers.command_line import run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROOFS = ROOT / "recipes" / "proofs"
RECIPES = (ROOT / "recipes" / "README.md").read_text()
FORMAT = (ROOT / "shardkit" / "shards" / "README.md").read_text()
CODE_MAP = (ROOT / "shardkit" / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
README_LINES = 150

PATTERNS = ("*.md", ".github/*.md", "recipes/**/*.md", "shardkit/**/*.md", "tests/**/*.md")
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))
WRITTEN_BY_HAND = [page for page in PAGES if not page.startswith(("recipes/proofs", "tests"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- map:begin -->.*?<!-- map:end -->", re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OLD_WORDS = (  # of a dialect that nobody else speaks, and what a plain sentence does not need
    r"\bdeal(s|t)?\b",
    r"\bsharers\b",
    r"\bbeside\b",
    r"\btold\b",
    r"\bapart\b",
    r"\bplanted\b",
    r"\bgo(es)? on with\b",
    r"\bas deep as can be\b",
    r"\bheard of\b",
    r"\bvery bytes\b",
    r"\bProve shards right\b",
    r"\bserves only who\b",
    r"\bspares\b",
    r"\bfalls silent\b",
    r"\bnever comes\b",
    r"\bnamed by their digests\b",
    r"\bcannot exchange\b",
    r"\bholding one more\b",
    r"\bno model can have\b",
    r"\bdid not come\b",
    r"\bdoes not tell which\b",
    r"\btensors meet\b",
    r"\bmodels? that sees?\b",
    r"(?<!there )\b(is|are) (none|no)\b(?! longer)",
    r"(^|[.!?] )Where\b",
    r"(?i)\b\w*(initialis|normalis|serialis|quantis|recognis|colour|honour|behaviour|neighbour)",
    r"(?i)\blicence\b",
    r"[.!?:]  [A-Z`]",  # two spaces after a full stop
)


def find_block(text: str, language: str) -> str:
    return next(fence[2] for fence in FENCE.finditer(text) if fence[1] == language)


def list_programs(text: str) -> Iterator[str]:
    """The shell commands of a page, one a line; continued lines joined."""
    for language, block in FENCE.findall(text):
        if language in ("sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if program := line.partition(" #")[0].strip():
                    yield program


def list_prose(text: str) -> Iterator[str]:
    """The lines of a page that a person wrote, without code."""
    yield from INLINE_CODE.sub("code", FENCE.sub("", GENERATED.sub("", text))).splitlines()


def list_commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", inner) for sub, inner in command.commands.items())


def find_anchors(text: str) -> set[str]:
    """The anchors that a code host makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def find_old_words(lines: Iterator[str]) -> list[str]:
    return [line for line in lines for words in OLD_WORDS if re.search(words, line)]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= README_LINES


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_the_words_of_a_page_are_plain_english(page: str) -> None:
    assert find_old_words(list_prose((ROOT / page).read_text())) == []


@pytest.mark.parametrize("name", ["", *(name for name, _ in list_commands())])
def test_the_words_of_help_are_plain_english(name: str) -> None:
    # As a user asks for it: click keeps the help option that the first context gives a command.
    assert find_old_words(iter(run(*name.split(), "--help").stdout.splitlines())) == []


def test_every_command_is_documented() -> None:
    _, _, section = README.partition("\n## Commands\n")
    rows = re.findall(r"^\| `shardkit (\w+)", section.partition("\n## ")[0], re.MULTILINE)
    assert sorted(rows) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_shell_commands_parse(page: str) -> None:
    for program in list_programs((ROOT / page).read_text()):
        done = subprocess.run(
            ["bash", "-n", "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_shell_commands_are_ones_that_shardkit_has(page: str) -> None:
    for program in list_programs((ROOT / page).read_text()):
        words = shlex.split(program)
        if "shardkit" not in words[:1] and "-m shardkit " not in program:
            continue
        arguments = words[words.index("shardkit") + 1 :]
        command: click.Command = main
        while isinstance(command, click.Group):
            name = arguments.pop(0)
            inner = command.get_command(click.Context(command), name)
            assert inner is not None, f"{page}: {program}"
            command = inner
        command.make_context("shardkit", arguments)  # raises click.UsageError


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_options_exist(page: str) -> None:
    parameters = [p for _, command in list_commands() for p in command.params]
    options = {name for p in parameters if isinstance(p, click.Option) for name in p.opts}
    for code in INLINE_CODE.findall(FENCE.sub("", (ROOT / page).read_text())):
        if not code.startswith(("`python", "`pip", "`torchrun", "`git", "`make")):
            used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code))
            assert used <= options | {"--help", "--version"}, code


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_programs_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    code = INLINE_CODE.findall(text) + list(list_programs(text))
    for program in code:
        program = program.strip("`")
        if target := re.match(r"make (\w+)", program):
            assert target[1] in targets, program
        if module := re.match(r"python3? -m (tests\.[\w.]+)", program):
            assert find_spec(module[1]) is not None, program
        if script := re.match(r"python3? (\w+/\S+\.py)", program):
            assert (ROOT / script[1]).is_file(), program


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in LINK.findall(FENCE.sub("", text)):
        name, _, anchor = target.partition("#")
        if "://" in name or name.startswith("mailto:"):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in find_anchors(path.read_text()), target


def test_every_recipe_has_been_swept_as_it_is_and_every_proof_has_passed() -> None:
    results = SWEEP_RESULTS.read(PROOFS)
    recipes = [load_recipe(path) for path in list_recipe_files()]
    stale = [recipe.name for recipe in list_stale(results, recipes)]
    assert not stale, "run `shardkit recipes check --all --write --stale`"
    assert [r.name for r in list_alone(recipes) if not results[r.name].passed] == []


def test_the_page_of_families_is_what_the_sweep_found() -> None:
    recipes = [load_recipe(path) for path in list_recipe_files()]
    page = render_page(SWEEP_RESULTS.read(PROOFS), recipes, PROOFS)
    assert (PROOFS / "FAMILIES.md").read_text() == page


def test_every_generative_type_has_a_recipe_or_a_reason() -> None:
    recipes = [load_recipe(path) for path in list_recipe_files()]
    supported = {name for recipe in recipes for name in recipe.model_types}
    omitted = read_omissions(PROOFS).keys()
    assert omitted & supported == set()
    assert set(list_generative_types()) - supported == set(omitted)


def test_the_page_of_drafts_is_what_the_records_say() -> None:
    records = list(read_records(PROOFS / "drafts.jsonl").values())
    assert (PROOFS / "DRAFTS.md").read_text() == render_drafts(records)


def test_the_exit_codes_are_the_errors() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", CODE_MAP, re.MULTILINE)}
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.ShardkitError)
    }
    assert table == codes | {0, 2, 130, 143}


def test_the_manifest_example_has_the_keys_of_a_manifest() -> None:
    golden = next((ROOT / "tests/shards/golden").glob("manifest*.json")).read_bytes()
    example, manifest = json.loads(find_block(FORMAT, "json")), json.loads(golden)
    assert list_keys(example) | {"argument", "dim", "outer"} == list_keys(manifest)
    assert encode_manifest(parse_manifest(golden)) == golden


def test_every_manifest_key_and_style_is_explained() -> None:
    golden = next((ROOT / "tests/shards/golden").glob("manifest*.json")).read_bytes()
    explained = set(re.findall(r"`(\w+)`", FORMAT))
    assert list_keys(json.loads(golden)) <= explained
    assert set(STYLES) <= explained


def list_keys(value: Any) -> set[str]:
    """The keys of a manifest, however deep, but for those that are names of tensors or files."""
    if isinstance(value, list):
        return set().union(*map(list_keys, value))
    if not isinstance(value, dict):
        return set()
    keys = set(value)
    for name, inner in value.items():
        if name in ("tensors", "units", "pieces", "nonfinite", "companion_files"):
            entries = inner.values() if isinstance(inner, dict) else ()
            keys |= set().union(*map(list_keys, entries))
        elif not (name == "metadata" and isinstance(inner, dict)):
            keys |= list_keys(inner)
    return keys


def test_the_picture_of_a_fused_weight_shows_the_spans_of_its_ranks() -> None:
    heads, kv_heads = Section(units=4, size=64), Section(units=2, size=64, shared_by=4)
    for tp_rank in range(2):
        (line,) = re.findall(rf"^ rank {tp_rank} +(\[.*)->", README, re.MULTILINE)
        spans = [(int(a), int(b)) for a, b in re.findall(r"\[(\d+), (\d+)\)", line)]
        assert spans == [tuple(s) for s in rank_spans([heads, kv_heads, kv_heads], tp_rank, 2)]


def test_the_recipe_example_loads(tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    path.write_text(find_block(RECIPES, "toml"))
    assert load_recipe(path).model_types == ("llama",)


def test_every_recipe_key_is_documented() -> None:
    documented = set(re.findall(r"^\| `\[?(\w+)\]?` \|", RECIPES, re.MULTILINE))
    assert documented >= KEYS


def test_every_format_has_been_swept_as_it_is_and_every_proof_has_passed() -> None:
    results = FORMAT_RESULTS.read(PROOFS)
    samples = list(list_format_samples())
    stale = [s.name for s in samples if results[s.name].digest != digest_format(s)]
    assert not stale, "run `shardkit recipes check --formats --write`"
    assert [name for name, result in results.items() if not result.passed] == []
    assert (PROOFS / "FORMATS.md").read_text() == render_formats(results)
