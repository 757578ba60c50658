"""What `shardkit recipes draft` writes and says."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from shardkit.authoring.draft.draft import Draft, make_draft
from shardkit.authoring.draft.proofs import outcomes_json
from shardkit.cli.options import status_line
from shardkit.cli.output import format_count
from shardkit.errors import OutputError
from shardkit.strict_json import escape_line


def run_draft(model: str, out: Path | None) -> dict[str, Any]:
    """Make a draft and write its file, as JSON values. Raises OutputError before any work."""
    with _new_file(out) as write, status_line() as say:
        made = make_draft(model, say)
        write(made.text)
    return draft_json(made, out)


def draft_json(made: Draft, out: Path | None) -> dict[str, Any]:
    """A draft for a program."""
    return {
        "model_type": made.content.model_type,
        "passed": made.passed,
        "out": None if out is None else str(out),
        "recipe": made.text,
        "trials": outcomes_json(made.outcomes),
        "whole": dict(made.content.whole),
        "plan_entries": made.hints[0],
        "unlike_the_plan": list(made.hints[1]),
        "unmatched_tensors": list(made.unmatched),
    }


def say_draft(made: dict[str, Any]) -> None:
    """The recipe on stdout, unless it is in a file; what a user must know of it on stderr."""
    if made["out"] is None:
        click.echo(made["recipe"], nl=False)
    else:
        click.echo(f"Wrote {escape_line(made['out'])}: a draft to read before it is used")
    for pattern, reason in made["whole"].items():
        click.echo(escape_line(f"whole on every rank: {pattern}: {reason}"), err=True)
    if unmatched := made["unmatched_tensors"]:
        told = f"{format_count(len(unmatched), 'tensor')} of the checkpoint have no rule yet: "
        click.echo(escape_line(told + ", ".join(unmatched[:5])), err=True)


@contextmanager
def _new_file(path: Path | None) -> Iterator[Callable[[str], object]]:
    """What writes text to a file that is made now and removed again if nothing is written.

    Raises OutputError where it exists or cannot be made.
    """
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
