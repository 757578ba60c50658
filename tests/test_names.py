"""Names, lengths and rooms, counted: what keeps the code easy to find one's way in."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shardkit"
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = [
    *MODULES,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
MAX_FILE = 300
MAX_FUNCTION = 45
MAX_ONE_WORD = 0.15
# Commands of the command line, verbs of the public API, and verbs that need no object.
PLAIN_VERBS = {
    "connect", "launch", "load", "main", "merge", "partition", "plan", "quote", "reshard", "split",
    "verify", "coalesce", "perturb", "prove",
}  # fmt: skip
# Participles and dialect that once named functions, fields or keys: none may come back.
FORBIDDEN = {
    "deal", "sharers", "beside", "takes", "told", "apart", "held", "joined", "misses", "reused",
    "shrunk", "inert", "owners", "fate", "ways", "judged", "written", "described", "left",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file, methods and inner ones too."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def public_functions() -> list[tuple[Path, str]]:
    """The public functions of modules, by file; methods are read with their class."""
    return [
        (path, node.name)
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, Function) and not node.name.startswith("_")
    ]


def defined_names(path: Path) -> Iterator[str]:
    """What a file calls its functions, classes, and the fields of its classes."""
    for node in ast.walk(tree(path)):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_no_file_or_function_is_too_long_to_take_in(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for node in functions(path):
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        assert length <= MAX_FUNCTION, f"{node.name}: {length} lines"


def test_few_functions_are_named_by_one_word_and_those_are_verbs() -> None:
    every = public_functions()
    one_word = {(path, name) for path, name in every if "_" not in name}
    assert len(one_word) / len(every) <= MAX_ONE_WORD
    others = {
        f"{shown(path)}: {name}"
        for path, name in one_word
        if name not in PLAIN_VERBS and "cli" not in path.parts
    }
    assert not others


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_the_old_dialect_names_nothing(path: Path) -> None:
    assert not FORBIDDEN & {name.strip("_") for name in defined_names(path)}


def test_a_public_name_has_one_meaning() -> None:
    """No two modules define a public class or function of one name; commands are their verbs."""
    homes: dict[str, set[str]] = {}
    for path in MODULES:
        for node in tree(path).body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(shown(path))
    shared = {
        name: sorted(paths)
        for name, paths in homes.items()
        if len({path for path in paths if "/cli/" not in path}) > 1 and name != "main"
    }
    assert not shared
