"""What `shardkit recipes draft` writes and prints."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from shardkit.authoring.draft.draft import draft_recipe
from shardkit.authoring.draft.draft_all import draft_types, list_pending, read_records
from shardkit.authoring.draft.drafts_page import render_drafts
from shardkit.authoring.publishing import find_proofs_folder
from shardkit.cli.options import status_line
from shardkit.cli.output import format_count, print_line
from shardkit.errors import OutputError
from shardkit.strict_json import escape_line


def run_draft(model: str, out: Path | None) -> dict[str, Any]:
    """Draft a recipe and write its file; the draft as JSON values.

    Raises:
        OutputError: The file exists or cannot be written. Raised before anything is drafted.
    """
    with _create_file(out) as write, status_line() as report:
        draft = draft_recipe(model, report)
        write(draft.text)
    return {**draft.to_json(), "out": None if out is None else str(out)}


def print_draft(draft: dict[str, Any]) -> None:
    """Print the recipe on stdout unless it is in a file, and notes on it on stderr."""
    if draft["out"] is None:
        click.echo(draft["recipe"], nl=False)
    else:
        click.echo(f"Wrote {escape_line(draft['out'])}: a draft to review before use")
    for pattern, reason in draft["replicated"].items():
        click.echo(escape_line(f"replicated: {pattern}: {reason}"), err=True)
    if unmatched := draft["unmatched_tensors"]:
        count = format_count(len(unmatched), "tensor")
        names = ", ".join(unmatched[:5])
        click.echo(escape_line(f"{count} of the checkpoint have no rule yet: {names}"), err=True)


def run_all_drafts(
    out: Path | None, limit: int | None, seconds_per_type: float, show: bool
) -> dict[str, Any]:
    """Draft every generative model type that has no record yet, and write the page of all.

    Args:
        out: The file of records, with the page next to it; by default those of the checkout.
        limit: How many types to draft at most in this run.
        seconds_per_type: A type that takes longer has failed.
        show: Whether to print a line for each type.

    Returns:
        How many types this run drafted, and how many of all recorded ones passed, as JSON values.
    """
    records_path, page_path = _list_outputs(out)
    pending = list_pending(read_records(records_path))[:limit]
    for record in draft_types(pending, records_path, seconds_per_type):
        if show:
            verdict = "passed" if record.passed else f"FAILED {record.stage}: {record.reason}"
            print_line(f"{record.model_type}: {verdict} ({record.seconds:.1f} s)")
    records = list(read_records(records_path).values())
    page_path.write_text(render_drafts(records), encoding="utf-8")
    return {
        "drafted": len(pending),
        "model_types": len(records),
        "passed": sum(record.passed for record in records),
        "records_file": str(records_path),
        "page": str(page_path),
    }


def _list_outputs(out: Path | None) -> tuple[Path, Path]:
    """The file of records and the page."""
    if out is not None:
        return out, out.with_suffix(".md")
    folder = find_proofs_folder()
    return folder / "drafts.jsonl", folder / "DRAFTS.md"


@contextmanager
def _create_file(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Create a file, and remove it again if nothing is written to it; yields what writes."""
    if path is None:
        yield lambda text: None
        return
    try:
        file = path.open("x", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; give --out a new file") from None
    with file:
        try:
            yield file.write
        finally:
            if not file.tell():
                os.unlink(path)
