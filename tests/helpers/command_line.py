"""Runs the command line, in this process or in one of its own."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

from click.testing import CliRunner, Result

from shardkit.cli import main

SHARDKIT = [sys.executable, "-m", "shardkit"]


def run(*arguments: str | Path) -> Result:
    """A command in this process; its output, and SystemExit as the only exception."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def environment(**more: str) -> dict[str, str]:
    """For a subprocess: this checkout is importable.

    torch makes a folder for what it compiles as it is imported; not among what is counted as left.
    """
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    defaults = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
