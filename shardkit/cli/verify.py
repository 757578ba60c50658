"""`shardkit verify`: the levels on stdout, and the exit code."""

from pathlib import Path

import click

from shardkit.cli.options import FOLDER, JSON, REVISION, progress_bar
from shardkit.cli.run_options import (
    DEVICE,
    DTYPE,
    TIMEOUT,
    end_on_sigterm,
    quiet_transformers,
)
from shardkit.cli.text import say, say_json
from shardkit.errors import ManifestError, VerifyError
from shardkit.manifest_file import read_manifest
from shardkit.timeouts import Timeouts
from shardkit.verify.report import Report
from shardkit.verify.run import Level, Request
from shardkit.verify.run import verify as run


@click.command()
@click.argument("shards", type=FOLDER)
@click.option("--against", "source", metavar="SOURCE", help="The checkpoint that was split.")
@click.option(
    "--level",
    type=click.Choice(["files", "weights", "numerics"]),
    default="numerics",
    show_default=True,
    help="How deep to look; each level includes those before.",
)
@REVISION
@DTYPE
@DEVICE
@TIMEOUT
@JSON
def verify(
    shards: Path,
    source: str | None,
    level: Level,
    revision: str | None,
    dtype: str | None,
    device: str | None,
    timeouts: Timeouts,
    as_json: bool,
) -> None:
    """Prove shards right, or say what is wrong.

    Three levels.  files: every file is the one that was written.  weights: every byte on every rank
    is the source's.  numerics: the shards, run together, compute what the unsharded model computes,
    within its own rounding error; where they do not, the first module that diverges is named.

    Ranks are started here, unless torchrun has started them.  Exits with 4 if a level fails.

    \b
    Example:
      shardkit verify llama-tp4 --against models/llama
      torchrun --nproc-per-node 4 -m shardkit verify llama-tp4 --against models/llama
    """
    request = Request(shards, source, revision, level, dtype, device, timeouts)
    quiet_transformers()
    end_on_sigterm()
    with progress_bar(_bytes_to_read(request), "verify") as advance:
        report = run(request, advance)
    if report is None:
        return
    if as_json:
        say_json(report.to_json())
    else:
        say_report(report)
    if not report.passed:
        raise VerifyError(f"{shards}: not what it should be; see the report")


def say_report(report: Report) -> None:
    """A line for each level, and its faults below it."""
    for check in report.checks:
        say(f"{check.name:9} {check.verdict:8}  {check.summary}")
        for fault in check.faults:
            say(f"{'':18}  {fault}")


def _bytes_to_read(request: Request) -> int:
    try:
        total = sum(rank.digest.size for rank in read_manifest(request.folder).ranks)
    except ManifestError:
        return 0
    return total * 2 if request.source and request.level != "files" else total
