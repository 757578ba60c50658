"""`shardkit verify`: the levels on stdout, and the exit code."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from shardkit.checkpoint.pickled.convert import open_source
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
from shardkit.errors import LayoutError, ManifestError, VerifyError
from shardkit.files import track_progress
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import Timeouts
from shardkit.verification.levels import Level, Request
from shardkit.verification.levels import verify as run
from shardkit.verification.report import Report
from shardkit.verification.scope import Scope


def part(
    _ctx: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """`1/4` as numbers. Raises click.BadParameter."""
    if value is None:
        return None
    found, _, parts = value.partition("/")
    if not (found.isdecimal() and parts.isdecimal() and 1 <= int(found) <= int(parts)):
        raise click.BadParameter(f"{value!r} is no part such as 1/4")
    return int(found), int(parts)


@click.command()
@click.argument("shards", type=FOLDER)
@click.option("--against", "source", metavar="SOURCE", help="The checkpoint that was split.")
@click.option(
    "--level",
    type=click.Choice(["files", "weights", "numerics"]),
    help="How deep to look; each level includes those before. By default as deep as can be.",
)
@click.option("--quick", is_flag=True, help="Read no shard data: sizes, headers, the small files.")
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    metavar="R",
    help="Look at one rank's file only: what its host needs.",
)
@click.option(
    "--subset",
    callback=part,
    metavar="N/T",
    help="Read the data of the N-th of T parts of the ranks' files.",
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
    level: Level | None,
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
    """Prove shards right, or say what is wrong.

    Three levels.  files: every file is the one that was written.  weights: every byte on every rank
    is the source's.  numerics: the shards, run together, compute what the unsharded model computes,
    within its own rounding error; where they do not, the first module that diverges is named.

    Without the source, files alone can be shown: that the weights are those that the split wrote,
    by sha256. Ranks are started here, unless torchrun has started them. Exits with 4 if a level
    fails.

    \b
    Example:
      shardkit verify llama-tp4 --against models/llama
      shardkit verify llama-tp4 --quick
      shardkit verify llama-tp4 --subset 1/4
      torchrun --nproc-per-node 4 -m shardkit verify llama-tp4 --against models/llama
    """
    scope = Scope(rank, subset, quick)
    deep = depth(scope, level)
    quiet_transformers()
    end_on_sigterm()
    with readable(source, revision, allow_pickle) as found:
        request = Request(shards, *found, deep, dtype, device, scope, timeouts)
        with progress_bar("verify") as callback:
            report = run(request, track_progress(_bytes_to_read(request), callback))
    if report is None:
        return
    if as_json:
        print_json(report.to_json())
    else:
        say_report(report)
    if not report.passed:
        raise VerifyError(f"{shards}: not what it should be; see the report")


@contextmanager
def readable(
    source: str | None, revision: str | None, allow_pickle: bool
) -> Iterator[tuple[str | None, str | None]]:
    """A source and revision whose weights are safetensors; ranks that torchrun adds read none."""
    if source is None or not allow_pickle or os.environ.get("RANK", "0") != "0":
        yield source, revision
        return
    with open_source(source, revision, allow_pickle) as checkpoint:
        yield str(checkpoint.folder), None


def depth(scope: Scope, level: Level | None) -> Level:
    """How deep to look: as deep as the scope allows, unless said. Raises click.UsageError."""
    if scope.subset and (scope.quick or scope.rank is not None):
        raise click.UsageError("--subset says whose data is read: leave out --quick and --rank")
    deepest: Level = "files" if scope.quick else "numerics" if scope.whole else "weights"
    order = ("files", "weights", "numerics")
    if level and order.index(level) > order.index(deepest):
        raise click.UsageError(f"--level {level} needs more than --quick, --rank or --subset read")
    return level or deepest


def say_report(report: Report) -> None:
    """A line for each level, and its faults below it."""
    for check in report.checks:
        print_line(f"{check.name:9} {check.verdict:8}  {check.summary}")
        for fault in check.faults:
            print_line(f"{'':18}  {fault}")


def _bytes_to_read(request: Request) -> int:
    try:
        manifest = read_manifest(request.folder)
        read = request.scope.read(manifest.tp_size)
    except (ManifestError, LayoutError):
        return 0
    total = sum(manifest.ranks[rank].digest.size for rank in read)
    if request.source is None or request.level == "files":
        return total
    downloaded = (
        0 if Path(request.source).is_dir() else sum(p.spec.nbytes for p in manifest.plan.placements)
    )
    return total * 2 + downloaded
