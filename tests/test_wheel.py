"""The wheel holds all that a checkout has, and works where there is no checkout."""

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shardkit import __version__

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "shardkit", "recipes")


def run_checked(*command: str | Path, folder: Path) -> str:
    """Run a command in `folder`, with nothing of this checkout on its path; its output."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**environment, "PIP_NO_INDEX": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout: a build leaves folders where it runs."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / "source" / part, ignore=ignored)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / part, folder / "source" / part)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run_checked(*PIP, "wheel", folder / "source", *options, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A virtual environment with the wheel, its dependencies borrowed from this one."""
    environment = wheel.parent / "venv"
    run_checked(sys.executable, "-m", "venv", "--without-pip", environment, folder=wheel.parent)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Read as plain folders: the .pth files in them, such as an editable shardkit's, do not count.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    python = environment / "bin" / "python"
    run_checked(*PIP, "--python", python, "install", "--no-deps", wheel, folder=wheel.parent)
    return environment


def test_every_module_and_recipe_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("shardkit/**/*.py")}
    recipes = {
        f"shardkit/{path.relative_to(ROOT)}"
        for pattern in ("recipes/*.toml", "recipes/samples/*.toml")
        for path in ROOT.glob(pattern)
    }
    pages = {str(path.relative_to(ROOT)) for path in ROOT.glob("shardkit/**/README.md")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert modules | recipes | pages | {"shardkit/py.typed"} <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}


def test_the_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"shardkit-{__version__}-")


def test_an_installed_command_finds_the_recipes(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "shardkit"
    assert __version__ in run_checked(command, "--version", folder=tmp_path)
    listed = json.loads(run_checked(command, "recipes", "list", "--json", folder=tmp_path))
    names = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    assert {entry["recipe"] for entry in listed} == names


def test_an_installed_package_is_imported_from_the_wheel_and_typed(
    installed: Path, tmp_path: Path
) -> None:
    program = "import shardkit; print(shardkit.__file__)"
    python = installed / "bin" / "python"
    module = Path(run_checked(python, "-c", program, folder=tmp_path).strip())
    assert module.is_relative_to(installed)
    assert module.with_name("py.typed").is_file()
