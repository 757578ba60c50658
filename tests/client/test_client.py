"""The example client runs, and its types are right for a user who checks them strictly."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import shardkit
from shardkit import errors, runtime, serve
from shardkit.cli.demo import make_decoder
from tests.helpers.command_line import environment

ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("stream_shards.py")
WHOLE = Path(__file__).with_name("whole_interface.py")
RECORDS = (
    runtime.Chunk, runtime.Completion, runtime.EngineStatus, runtime.Limits, runtime.RequestResult,
    runtime.SamplingParams, runtime.TokenLogprob, serve.ServeOptions,
)  # fmt: skip
OF_THE_ENGINE = {"add", "fail"}  # what the engine calls of a handle
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights from a seed, and a tokenizer of one word for each token."""
    folder = make_decoder(tmp_path_factory.mktemp("client") / "source")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment in which this checkout is an installed package.

    mypy reads the types of an installed package only if it has a py.typed file. torch is left out:
    its own types take minutes to read, and the client uses none of them.
    """
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "checkout.pth").write_text(str(ROOT))
    return folder / "bin" / "python"


def run_client(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLIENT), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def test_the_client_splits_verifies_and_streams(source: Path, tmp_path: Path) -> None:
    done = run_client(source, tmp_path / "shards", "2", "w5 w9 w2 w6")
    assert done.returncode == 0, done.stderr
    assert "bytes on the largest of 2 ranks" in done.stdout
    assert len(re.findall(r"\bw\d+\b", done.stdout)) == 32
    assert (tmp_path / "shards" / "manifest.json").exists()


def test_the_client_ends_with_one_line_about_a_bad_source(tmp_path: Path) -> None:
    done = run_client(tmp_path / "missing", tmp_path / "shards", "2", "w5")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "missing" in done.stderr


def test_the_client_uses_the_public_functions_only() -> None:
    nodes = list(ast.walk(ast.parse(CLIENT.read_text())))
    modules = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    assert modules == {"sys", "shardkit", "shardkit.errors"}
    assert {"plan", "split", "verify", "launch"} <= used_functions(CLIENT.read_text())
    assert len(CLIENT.read_text().splitlines()) <= 40


def test_the_readme_quotes_the_client() -> None:
    (example,) = PYTHON_BLOCK.findall((ROOT / "README.md").read_text())
    ast.parse(example)
    client = {line.strip() for line in CLIENT.read_text().splitlines()}
    header, *quoted = [line.strip() for line in example.splitlines() if line.strip()]
    assert header == "import shardkit"
    assert [line for line in quoted if line not in client and not line.startswith("source, ")] == []


@pytest.mark.parametrize("page", ["README.md", "shardkit/__init__.py"])
def test_examples_use_functions_that_exist(page: str) -> None:
    names = used_functions((ROOT / page).read_text())
    assert names
    assert names <= {*shardkit.__all__, "runtime"}


def test_clients_that_are_checked_strictly_pass(interpreter: Path) -> None:
    done = check_types(interpreter, CLIENT, WHOLE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_client_uses_every_public_name() -> None:
    """Of each module what it exports, of each class its public members, each error by name."""
    names = {*shardkit.__all__, *runtime.__all__, *serve.__all__}
    names |= {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    names |= {name for kind in (runtime.Engine, runtime.Handle) for name in vars(kind)}
    names |= {field.name for kind in RECORDS for field in fields(kind)}
    public = {name for name in names if not name.startswith("_") or name == "__version__"}
    assert public - used_names(WHOLE.read_text()) == OF_THE_ENGINE


def test_a_client_that_is_checked_sees_the_types(interpreter: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    lines = [f"reveal_type(shardkit.{name})" for name in sorted(set(shardkit.__all__))]
    lines.append('shardkit.split("source", "out", tp_size="four")')
    program.write_text("\n".join(["import shardkit", *lines]))
    done = check_types(interpreter, program)
    for kind in ("PlanReport", "SplitResult", "MergeResult", "Report | None", "Engine"):
        assert re.search(rf"-> .*\b{re.escape(kind)}\"", done.stdout), done.stdout
    assert 'Argument "tp_size" to "split" has incompatible type "str"' in done.stdout


def used_functions(text: str) -> set[str]:
    """The functions called as `shardkit.NAME(`."""
    return set(re.findall(r"\bshardkit\.(\w+)\(", text))


def used_names(text: str) -> set[str]:
    """The names that a program imports, the attributes and the keyword arguments that it uses."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("shardkit."):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return names


def check_types(python: Path, *programs: Path) -> subprocess.CompletedProcess[str]:
    """What `mypy --strict` says of programs, with no configuration but its own defaults."""
    options = ["--strict", "--config-file", "", "--python-executable", str(python)]
    cache = python.parent / "mypy-cache"
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(cache)]
    command += map(str, programs)
    return subprocess.run(
        command, cwd=programs[0].parent, capture_output=True, text=True, timeout=280, check=False
    )
