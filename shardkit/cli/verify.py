"""`shardkit verify`: the levels on stdout, and the exit code."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from shardkit import verification
from shardkit.cli.options import ALLOW_PICKLE, FOLDER, JSON, REVISION, progress_bar
from shardkit.cli.output import print_json, print_line
from shardkit.cli.run_options import (
    DEVICE,
    DTYPE,
    TIMEOUT,
    end_on_sigterm,
    quiet_transformers,
)
from shardkit.errors import VerifyError
from shardkit.timeouts import Timeouts


def read_subset(
    _ctx: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """`1/4` as numbers. Raises click.BadParameter."""
    if value is None:
        return None
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise click.BadParameter(f"{value!r} is not a subset such as 1/4")
    return int(part), int(parts)


@click.command()
@click.argument("shards", type=FOLDER)
@click.option("--against", "source", metavar="SOURCE", help="The checkpoint that was split.")
@click.option(
    "--level",
    type=click.Choice(["files", "weights", "numerics"]),
    help="Deepest check to run: files, weights or numerics (default: the deepest possible).",
)
@click.option("--quick", is_flag=True, help="Read no shard data: sizes, headers, the small files.")
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    metavar="R",
    help="Check one rank's file only, which is what its host needs.",
)
@click.option(
    "--subset",
    callback=read_subset,
    metavar="N/T",
    help="Read the data of the N-th of T subsets of the ranks' files.",
)
@REVISION
@ALLOW_PICKLE
@DTYPE
@DEVICE
@TIMEOUT
@JSON
def verify(
    shards: Path,
    source: str | None,
    level: verification.Level | None,
    quick: bool,
    rank: int | None,
    subset: tuple[int, int] | None,
    revision: str | None,
    allow_pickle: bool,
    dtype: str | None,
    device: str | None,
    timeouts: Timeouts,
    as_json: bool,
) -> None:
    """Verify a shard folder and report what is wrong.

    Three levels, of which each includes those before it. files: every file is the one that the
    split wrote. weights: every byte on every rank is the source's. numerics: the shards, run
    together, compute what the unsharded model computes, within its own rounding error; if they do
    not, the first diverging module is named.

    Without the source only the files can be verified: the weights are those that the split wrote,
    by sha256. Ranks are started on this host, unless torchrun has started them. Exits with 4 if a
    level fails.

    \b
    Example:
      shardkit verify llama-tp4 --against models/llama
      shardkit verify llama-tp4 --quick
      shardkit verify llama-tp4 --subset 1/4
      torchrun --nproc-per-node 4 -m shardkit verify llama-tp4 --against models/llama
    """
    quiet_transformers()
    end_on_sigterm()
    with show_progress() as progress:
        report = verification.verify(
            shards,
            source,
            level=level,
            quick=quick,
            rank=rank,
            subset=subset,
            revision=revision,
            allow_pickle=allow_pickle,
            dtype=dtype,
            device=device,
            timeouts=timeouts,
            progress=progress,
        )
    if report is None:
        return
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    if not report.passed:
        raise VerifyError(f"{shards}: verification failed; see the report")


@contextmanager
def show_progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes on stderr, from the first call on; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    advance: Callable[[int], None] | None = None
    shown = 0
    with ExitStack() as stack:

        def show(done: int, total: int) -> None:
            nonlocal advance, shown
            advance = advance or stack.enter_context(progress_bar(total, "verify"))
            advance(done - shown)
            shown = done

        yield show


def print_report(report: verification.Report) -> None:
    """Print a line for each level, and its faults below it."""
    for check in report.checks:
        print_line(f"{check.name:9} {check.verdict:8}  {check.summary}")
        for fault in check.faults:
            print_line(f"{'':18}  {fault}")
