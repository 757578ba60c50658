"""Imports go one way, and what needs no torch does not load it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from shardkit.recipe.catalog import list_recipe_files
from shardkit.recipe.parse import load_recipe
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shardkit"
LAYERS = [  # a module imports only from the rows above its own; a package counts as one
    {"errors", "dtypes", "config_fields", "strict_json"},
    {"layout", "files", "tensor", "timeouts"},
    {"recipe", "checkpoint"},
    {"planning", "output"},
    {"shards"},
    {"runtime", "convert"},
    {"verification", "serve"},
    {"authoring"},
    {"cli"},
]
TORCH = {"torch", "transformers", "safetensors"}
HEAVY = TORCH | {"numpy", "huggingface_hub", "tokenizers"}
SCREEN = {"click", "tqdm"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(name: str) -> int:
    (found,) = (at for at, names in enumerate(LAYERS) if name in names)
    return found


def part(path: Path) -> str:
    """The row entry of a file: its package below shardkit, or its own name."""
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "cli" if name == "__main__" else name  # which starts it, and no more


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: everything but function bodies and what is for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from outside_functions(child)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules imported, in full: of `from a import b`, `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(names: Iterator[str]) -> Iterator[str]:
    """The parts of shardkit among imported modules, `shardkit.__version__` left out."""
    for name in names:
        top, *rest = name.split(".")
        if top == "shardkit" and rest[:1] not in ([], ["__version__"]):
            yield ".".join(rest)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_its_layer() -> None:
    parts = {part(path) for path in MODULES} - {"__init__"}
    assert parts <= set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_imports_go_one_way(path: Path) -> None:
    if part(path) == "__init__":
        used = set(own(imported(outside_functions(tree(path)))))
        assert not used, "importing shardkit must load none of it"
        return
    used = {name.split(".")[0] for name in own(imported(ast.walk(tree(path))))}
    above = {name for name in used - {part(path)} if layer(name) >= layer(part(path))}
    assert not above, f"{part(path)} is below {above}"


def test_the_rooms_are_few_enough_to_see_at_once() -> None:
    rooms = {part(path) for path in MODULES} - {"__init__"}
    assert len(rooms | {"__main__"}) <= 20, sorted(rooms)


def test_the_runtime_needs_no_recipe_file() -> None:
    for path in (PACKAGE / "runtime").rglob("*.py"):
        used = set(own(imported(ast.walk(tree(path)))))
        assert not {name for name in used if name.startswith("recipe.parse")}, path


def test_no_package_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.name != "__init__.py":
            graph[name] = set(own(imported(outside_functions(tree(path)))))
    known = set(graph)
    for name, used in graph.items():
        named = {u if u in known else u.rpartition(".")[0] for u in used}
        graph[name] = (named & known) - {name}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(known)


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_only_what_runs_models_needs_torch_to_be_imported(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(outside_functions(tree(path)))}
    if part(path) not in ("runtime", "verification", "authoring"):
        assert not tops & TORCH
    if part(path) != "cli":
        assert not tops & SCREEN, "only the command line prints"


BUILT_IN = {"lstm"}  # torch's own module, and the language model of it that transformers lacks
ENGLISH = {"beam", "git"}  # a way of searching, and the version control, too
TOWERS = {"vit"}  # what some checkpoints call the module of a tower


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def words(node: ast.AST) -> list[str]:
    """The names in a piece of code, strings taken apart; those of documents are not code."""
    match node:
        case ast.Constant(value=str(text)):
            return re.findall(r"[\w-]+", text)
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return [name]
    return []


@cache
def list_types() -> set[str]:
    """Every recipe's name and model types, as plain words."""
    recipes = [load_recipe(path) for path in list_recipe_files()]
    return {plain(name) for recipe in recipes for name in (recipe.name, *recipe.model_types)}


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_no_model_type_is_named_in_code(path: Path) -> None:
    types = list_types()
    code = tree(path)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(code)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    nodes = (node for node in ast.walk(code) if id(node) not in documents)
    used = {plain(word) for node in nodes for word in words(node)}
    assert not used & (types - BUILT_IN - ENGLISH - TOWERS)


def loaded(*arguments: str) -> set[str]:
    """The top-level packages that a command loads."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "shardkit", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    names = re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "shardkit.cli" in names
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("split", "--help")])
def test_help_loads_no_torch(arguments: tuple[str, ...]) -> None:
    assert not loaded(*arguments) & HEAVY


@pytest.mark.parametrize("name", ["shardkit", "shardkit.runtime"])
def test_importing_a_package_loads_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print(*(set(sys.modules) & {HEAVY}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "\n"


def test_plan_split_merge_and_inspect_load_no_torch(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", llama_config(), specs_of(llama()))
    shards, merged = str(tmp_path / "shards"), str(tmp_path / "merged")
    for arguments in (
        ("plan", str(source), "--tp", "2"),
        ("split", str(source), shards, "--tp", "2"),
        ("inspect", shards),
        ("reshard", shards, str(tmp_path / "three"), "--tp", "3"),
        ("merge", shards, merged),
    ):
        counts = {"numpy"} if arguments[0] == "split" else set()  # of NaN and infinite values
        assert loaded(*arguments) & HEAVY <= counts, arguments
