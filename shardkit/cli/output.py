"""How results are shown: printable, sizes a person can read, JSON a program can."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import click

from shardkit.strict_json import escape_line

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def print_line(line: str = "") -> None:
    """One line on stdout, with what the terminal's encoding lacks escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(escape_line(line).encode(encoding, "backslashreplace").decode(encoding))


def print_warning(text: str) -> None:
    """One line on stderr."""
    click.echo(f"Warning: {escape_line(text)}", err=True)


def print_json(value: object) -> None:
    """One JSON object on stdout, in ASCII."""
    click.echo(json.dumps(value, indent=2))


def format_bytes(nbytes: int) -> str:
    """Bytes in decimal units, as disks and models are sold."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"


def format_rate(nbytes: int, seconds: float) -> str:
    """Bytes, how long they took, and how many that is in a second."""
    rate = nbytes / seconds / 1e9
    return f"{format_bytes(nbytes)} in {seconds:.1f} s ({rate:.2f} GB/s)"


def format_count(count: int, noun: str) -> str:
    """A count and its noun: `1 rank`, `4 ranks`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def group_ranks(values: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Values of ranks, neighbors that are equal together: `rank 0-3`."""
    for value, same in groupby(range(len(values)), key=values.__getitem__):
        ranks = list(same)
        last = f"-{ranks[-1]}" if len(ranks) > 1 else ""
        yield f"rank {ranks[0]}{last}", value
