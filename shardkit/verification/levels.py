"""Runs the levels of a verification, as deep as asked and as far as they make sense."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardkit.checkpoint import Checkpoint, open_checkpoint
from shardkit.errors import ManifestError, RanksLost, ShardkitError
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import Timeouts
from shardkit.verification.files import EVERYTHING, check_files
from shardkit.verification.report import Check, Report
from shardkit.verification.scope import Scope
from shardkit.verification.weights import check_weights

if TYPE_CHECKING:
    import torch

    from shardkit.verification.torchrun import JoinedRanks

Level = Literal["files", "weights", "numerics"]
NO_SOURCE = "that is shown against the source alone: name it with --against"
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
    scope: Scope = EVERYTHING
    timeouts: Timeouts = field(default_factory=Timeouts)


def verify(request: Request, progress: Callable[[int], object]) -> Report | None:
    """Check files, weights and numerics as deep as asked; a failed level ends it.

    Starts the ranks on this host; under torchrun it uses those, and only rank 0 returns a report.
    Raises CheckpointError for a source that cannot be read, before the shards are, LayoutError for
    a scope that the folder has no ranks for, and RanksError for ranks that disagree.
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
        with _source(request, progress) as source:
            return Report(str(request.folder), tuple(_checks(request, source, joined, progress)))
    finally:
        if joined is not None:
            joined.stop()


@contextmanager
def _source(request: Request, progress: Callable[[int], object]) -> Iterator[Checkpoint | None]:
    """The source, if a level needs it and there is one; the Hub's own bytes if it is from there."""
    if request.source is None or request.level == "files":
        yield None
        return
    with open_checkpoint(request.source, request.revision) as source:
        source.check_download(progress)
        yield source


def _checks(
    request: Request,
    source: Checkpoint | None,
    joined: JoinedRanks | None,
    progress: Callable[[int], object],
) -> Iterator[Check]:
    files = check_files(request.folder, progress, request.scope)
    yield files
    good = files.verdict == "passed"
    if request.level != "files":
        yield _weights(request, source, good, progress)
    if request.level == "numerics":
        yield (
            _numerics(request, source, joined) if good else Check("numerics", "not run", BAD_FILES)
        )


def _weights(
    request: Request, source: Checkpoint | None, good: bool, progress: Callable[[int], object]
) -> Check:
    """The weights against the source's: of damaged files too, to say which bytes are."""
    if source is None:
        return Check("weights", "not run", NO_SOURCE if good else BAD_FILES)
    try:
        return check_weights(request.folder, source, progress, request.scope)
    except ManifestError:
        if good:
            raise
        return Check("weights", "not run", BAD_FILES)


def _numerics(request: Request, source: Checkpoint | None, joined: JoinedRanks | None) -> Check:
    if source is None:
        return Check("numerics", "not run", NO_SOURCE)
    from shardkit.runtime.engine.rank_processes import Ranks
    from shardkit.verification.models import LocalRanks
    from shardkit.verification.numerics import check_numerics

    manifest, dtype = read_manifest(request.folder), _dtype(request.dtype)
    try:
        if joined is not None:
            return check_numerics(request.folder, manifest, source.folder, joined, dtype)
        with Ranks(manifest.tp_size, request.device, request.timeouts) as ranks:
            return check_numerics(request.folder, manifest, source.folder, LocalRanks(ranks), dtype)
    except RanksLost:
        raise
    except ShardkitError as error:
        return Check("numerics", "failed", "the shards do not run", (str(error),))


def _join(request: Request) -> JoinedRanks:
    from shardkit.runtime.distributed.group import connect
    from shardkit.verification.torchrun import JoinedRanks

    group = connect(request.device, request.timeouts)
    return JoinedRanks(group, request.folder, _dtype(request.dtype))


def _dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name."""
    import torch

    found: torch.dtype | None = getattr(torch, name) if name else None
    return found
