"""`shardkit verify`: the levels on stdout, and the exit code."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from shardkit import verification
from shardkit.cli.options import (
    ALLOW_PICKLE,
    DEVICE,
    DTYPE,
    FOLDER,
    JSON,
    MAX_MEMORY,
    REDUCE_DTYPE,
    REVISION,
    TIMEOUT,
    block_bar,
    end_on_sigterm,
    progress_bar,
    quiet_transformers,
)
from shardkit.cli.output import print_json, print_line
from shardkit.cli.report_file import REPORT, write_report_file
from shardkit.errors import VerifyError
from shardkit.verification.numerics_options import (
    NumericsOptions,
    RankChoice,
    ignore_blocks,
)
from shardkit.verification.report_page import render_report_page


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
@click.option(
    "--ranks",
    type=click.Choice(["auto", "real", "turns"]),
    default="auto",
    help="Run the ranks as processes, or in turns in this one, block by block, in bounded memory"
    " (default: as processes if all fits into memory).",
)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    metavar="N",
    help="Compare the first and last block, one of each kind, and N drawn at random.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="What a sample is drawn from.")
@MAX_MEMORY
@click.option(
    "--resume",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Note in FILE what is done, block by block, and resume from it if stopped.",
)
@REPORT
@REVISION
@ALLOW_PICKLE
@DTYPE
@REDUCE_DTYPE
@DEVICE
@TIMEOUT
@JSON
def verify(
    shards: Path,
    source: str | None,
    ranks: RankChoice,
    sample: int | None,
    seed: int,
    max_memory: int | None,
    resume: Path | None,
    reduce_dtype: str | None,
    report_file: Path | None,
    as_json: bool,
    **options: Any,
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
    with progress_bar("verify") as progress, block_bar() as show:
        numerics = NumericsOptions(
            ranks, max_memory, sample, seed, show or ignore_blocks, resume, reduce_dtype
        )
        report = verification.verify(
            shards, source, numerics=numerics, progress=progress, **options
        )
    if report is not None:
        report = replace(report, command=shlex.join(["shardkit", *sys.argv[1:]]))
        if report_file is not None:
            write_report_file(render_report_page(report), report_file)
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
