"""The file of a report: checked before the work, complete or absent after it."""

import os
from pathlib import Path

import click

from shardkit.errors import OutputError
from shardkit.output.atomic import rename_no_replace


def check_report_file(
    _ctx: click.Context, _option: click.Parameter, path: Path | None
) -> Path | None:
    """A file that can be made. Raises click.BadParameter if it is there or its folder is not."""
    if path is not None and path.exists():
        raise click.BadParameter(f"{path} exists: remove it, or give another name")
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"{path}: its folder does not exist: make it first")
    return path


REPORT = click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    callback=check_report_file,
    help="Also write the report as one HTML page that needs no other file.",
)


def write_report_file(text: str, path: Path) -> None:
    """Write a page or a chart, in one step, over nothing. Raises OutputError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        rename_no_replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: the report cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
