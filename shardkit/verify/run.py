"""Runs the levels of a verification, as deep as asked and as far as they make sense."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardkit.checkpoint import open_checkpoint
from shardkit.errors import RanksLost, ShardkitError
from shardkit.manifest_file import read_manifest
from shardkit.shards import ShardedCheckpoint
from shardkit.timeouts import Timeouts
from shardkit.verify.files import check_files
from shardkit.verify.report import Check, Report
from shardkit.verify.weights import check_weights

if TYPE_CHECKING:
    import torch

    from shardkit.verify.joined import JoinedRanks

Level = Literal["files", "weights", "numerics"]
NO_SOURCE = "needs the source: name it with --against"
BAD_FILES = "the files are not what was written"


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify, against what, how deep, and how to run it."""

    folder: Path
    source: str | None = None
    revision: str | None = None
    level: Level = "numerics"
    dtype: str | None = None
    device: str | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)


def verify(request: Request, progress: Callable[[int], object]) -> Report | None:
    """Check files, weights and numerics as deep as asked; a failed level ends it.

    Starts the ranks on this host; under torchrun it uses those, and only rank 0 returns a report.
    Raises CheckpointError for a source that cannot be read, and RanksError for ranks that disagree.
    """
    leads = os.environ.get("RANK", "0") == "0"
    joined = None
    if "WORLD_SIZE" in os.environ and request.level == "numerics" and request.source:
        joined = _join(request)
    if not leads:
        if joined is not None:
            joined.follow()
        return None
    try:
        return Report(str(request.folder), tuple(_checks(request, joined, progress)))
    finally:
        if joined is not None:
            joined.stop()


def _checks(
    request: Request, joined: JoinedRanks | None, progress: Callable[[int], object]
) -> list[Check]:
    checks = [check_files(request.folder, progress)]
    good = checks[0].verdict == "passed"
    if request.level != "files":
        checks.append(
            _weights(request, progress) if good else Check("weights", "not run", BAD_FILES)
        )
    if request.level == "numerics":
        checks.append(
            _numerics(request, joined) if good else Check("numerics", "not run", BAD_FILES)
        )
    return checks


def _weights(request: Request, progress: Callable[[int], object]) -> Check:
    if request.source is None:
        return Check("weights", "not run", NO_SOURCE)
    with (
        ShardedCheckpoint(request.folder) as shards,
        open_checkpoint(request.source, request.revision) as checkpoint,
    ):
        return check_weights(shards, checkpoint, progress)


def _numerics(request: Request, joined: JoinedRanks | None) -> Check:
    if request.source is None:
        return Check("numerics", "not run", NO_SOURCE)
    with open_checkpoint(request.source, request.revision) as checkpoint:
        source = checkpoint.folder
    from shardkit.runtime.ranks import Ranks
    from shardkit.verify.models import LocalRanks
    from shardkit.verify.numerics import check_numerics

    manifest, dtype = read_manifest(request.folder), _dtype(request.dtype)
    try:
        if joined is not None:
            return check_numerics(request.folder, manifest, source, joined, dtype)
        with Ranks(manifest.tp_size, request.device, request.timeouts) as ranks:
            return check_numerics(request.folder, manifest, source, LocalRanks(ranks), dtype)
    except RanksLost:
        raise
    except ShardkitError as error:
        return Check("numerics", "failed", "the shards do not run", (str(error),))


def _join(request: Request) -> JoinedRanks:
    from shardkit.runtime.group import connect
    from shardkit.verify.joined import JoinedRanks

    group = connect(request.device, request.timeouts)
    return JoinedRanks(group, request.folder, _dtype(request.dtype))


def _dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name."""
    import torch

    found: torch.dtype | None = getattr(torch, name) if name else None
    return found
