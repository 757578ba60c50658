"""How results are shown: printable, sizes a person can read, JSON a program can."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import click

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def escape_text(text: str) -> str:
    """The text on one line, with what cannot be printed escaped: control characters, bad bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_line(line: str = "") -> None:
    """One line on stdout, with what the terminal's encoding lacks escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(escape_text(line).encode(encoding, "backslashreplace").decode(encoding))


def print_json(value: object) -> None:
    """One JSON object on stdout, in ASCII."""
    click.echo(json.dumps(value, indent=2))


def format_bytes(nbytes: int) -> str:
    """Bytes in decimal units, as disks and models are sold."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"


def group_ranks(values: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Values of ranks, neighbours that are equal together: `rank 0-3`."""
    for value, same in groupby(range(len(values)), key=values.__getitem__):
        ranks = list(same)
        last = f"-{ranks[-1]}" if len(ranks) > 1 else ""
        yield f"rank {ranks[0]}{last}", value


def format_count(count: int, noun: str) -> str:
    """A count and its noun: `1 rank`, `4 ranks`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
