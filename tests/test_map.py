"""The map of the code, shardkit/README.md, is what the code is and does."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.cli.demo import make_decoder
from tests.helpers.command_line import environment
from tests.test_imports import PACKAGE
from tests.write_map import PAGE, read_summary, render_page

TEXT = PAGE.read_text()
STOP = re.compile(r"^\d+\. `([\w.]+)` ", re.MULTILINE)
WALKS = {
    "split": "## The walk of a tensor through split",
    "load": "## The walk of load on a rank",
}
MAX_STOPS = 12


def list_stops(heading: str) -> list[str]:
    """The functions of a walk: `convert.shard_writer.split`."""
    _, _, rest = TEXT.partition(f"{heading}\n")
    return STOP.findall(rest.partition("\n## ")[0])


def test_the_map_is_what_the_code_says() -> None:
    assert render_page(TEXT) == TEXT, "run `python -m tests.write_map`"


def test_every_module_says_what_it_is_for() -> None:
    summaries = {path: read_summary(path) for path in PACKAGE.rglob("*.py")}
    assert [str(path) for path, text in summaries.items() if len(text.split()) < 2] == []


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_has_few_stops_and_each_is_a_function(walk: str) -> None:
    stops = list_stops(WALKS[walk])
    assert 0 < len(stops) <= MAX_STOPS
    for stop in stops:
        assert is_function(stop), stop


def is_function(dotted: str) -> bool:
    """Whether the module that the first words name has the function, or the class its method."""
    words = dotted.split(".")
    sizes = [n for n in range(1, len(words)) if module_path(words[:n]).is_file()]
    if not sizes:
        return False
    scope: list[ast.stmt] = ast.parse(module_path(words[: sizes[-1]]).read_text()).body
    for word in words[sizes[-1] :]:
        nodes = [n for n in scope if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        matches = [node for node in nodes if node.name == word]
        if not matches:
            return False
        scope = matches[0].body
    return True


def module_path(words: list[str]) -> Path:
    return PACKAGE.joinpath(*words).with_suffix(".py")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a split, and a load of its one rank, really call."""
    folder = tmp_path_factory.mktemp("walks")
    source = make_decoder(folder / "source")
    program = [sys.executable, "-m", "tests.helpers.call_order"]
    done = subprocess.run(
        [*program, str(source), str(folder / "shards")],
        cwd=PACKAGE.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    order: dict[str, list[str]] = json.loads(done.stdout)
    return order


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_is_the_order_in_which_the_code_calls(
    walk: str, calls: dict[str, list[str]]
) -> None:
    remaining = iter(calls[walk])  # each stop is looked for after the one before it
    assert [stop for stop in list_stops(WALKS[walk]) if stop not in remaining] == []
