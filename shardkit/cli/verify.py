"""`shardkit verify`: the levels on stdout, and the exit code."""

from pathlib import Path

import click

from shardkit import verification
from shardkit.cli.options import (
    ALLOW_PICKLE,
    DEVICE,
    DTYPE,
    FOLDER,
    JSON,
    REVISION,
    TIMEOUT,
    end_on_sigterm,
    progress_bar,
    quiet_transformers,
)
from shardkit.cli.output import print_json, print_line
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

    files: every file is the one that the split wrote. weights: every byte on every rank is the
    source's. numerics: the shards, run together, compute what the unsharded model computes, within
    its own rounding error. Each level includes those before it; weights and numerics need the
    source. Ranks run on this host, unless torchrun has started them. Exits with 4 if a level fails.

    \b
    Example:
      shardkit verify llama-tp4 --against models/llama
      torchrun --nproc-per-node 4 -m shardkit verify llama-tp4 --against models/llama
    """
    quiet_transformers()
    end_on_sigterm()
    with progress_bar("verify") as progress:
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
    if report is not None:
        show_report(report, as_json)


def show_report(report: verification.Report, as_json: bool) -> None:
    """Print a report. Raises VerifyError if a level failed."""
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    if not report.passed:
        raise VerifyError(f"{report.folder}: verification failed; see the report")


def print_report(report: verification.Report) -> None:
    """Print a line for each level, and its faults below it."""
    for check in report.checks:
        print_line(f"{check.name:9} {check.verdict:8}  {check.summary}")
        for fault in check.faults:
            print_line(f"{'':18}  {fault}")
