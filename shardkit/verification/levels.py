"""Runs the levels of a verification: as deep as asked for, and until one fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.pickled.convert import open_source
from shardkit.errors import (
    CheckpointError,
    LayoutError,
    ManifestError,
    RanksLost,
    ShardkitError,
    UsageError,
)
from shardkit.files import ProgressCallback, track_progress
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts
from shardkit.verification.files import check_files
from shardkit.verification.report import Check, Report
from shardkit.verification.scope import Scope
from shardkit.verification.weights import check_weights

if TYPE_CHECKING:
    import torch

    from shardkit.runtime.engine.controller import TorchrunRanks

Level = Literal["files", "weights", "numerics"]
LEVELS: tuple[Level, ...] = get_args(Level)
DTYPES = ("float64", "float32", "bfloat16", "float16")
NO_SOURCE = "only a comparison with the source shows that: name it with --against"
BAD_FILES = "the files are not what the split wrote"


def verify(
    shards: str | Path,
    source: str | Path | None = None,
    *,
    level: Level | None = None,
    quick: bool = False,
    rank: int | None = None,
    subset: tuple[int, int] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    progress: ProgressCallback | None = None,
) -> Report | None:
    """Verify a shard folder, and report what is wrong.

    Ranks are started on this host; under torchrun its ranks are used, and every rank calls this.

    Args:
        shards: The shard folder.
        source: The folder or Hub id that was split; without it only the files can be verified.
        level: The deepest level to run: files, weights or numerics (default: the deepest possible).
        quick: Read no shard data: only sizes, headers and the small files.
        rank: Check this rank's file only.
        subset: `(n, t)`: read the data of the n-th of t subsets of the ranks' files, from 1.
        revision: The branch, tag or commit of a Hub id.
        allow_pickle: Convert a source's pickled weights, in a sandboxed subprocess.
        dtype: What to compute in, such as "bfloat16" (default: the checkpoint's own dtype).
        device: "cpu" or "cuda" (default: cuda if available).
        timeouts: How long to wait for ranks.
        progress: Called with the bytes read so far and in all.

    Returns:
        The report; None on every rank of torchrun but rank 0.

    Raises:
        ShardkitError: A UsageError, LayoutError, CheckpointError or RanksError.
    """
    scope, name = Scope(rank, subset, quick), None if source is None else str(source)
    request = _Request(
        Path(shards), name, choose_level(scope, level), scope, revision, allow_pickle,
        _dtype_name(dtype), device, timeouts,
    )  # fmt: skip
    return _run_request(request, progress)


def _run_request(request: _Request, progress: ProgressCallback | None) -> Report | None:
    """Run the levels on torchrun's rank 0, or here; the other ranks follow it."""
    is_torchrun = "WORLD_SIZE" in os.environ
    ranks = _connect(request) if is_torchrun and request.runs_numerics else None
    if is_torchrun and os.environ.get("RANK", "0") != "0":
        if ranks is not None:
            ranks.follow()
        return None
    try:
        with _open_source(request) as checkpoint:
            advance = track_progress(_count_bytes(request), progress)
            run = _Run(request, checkpoint, ranks, advance)
            if checkpoint is not None:
                checkpoint.check_download(advance)
            return Report(str(request.folder), tuple(run.checks()))
    finally:
        if ranks is not None:
            ranks.close()


def choose_level(scope: Scope, level: Level | None) -> Level:
    """The deepest level that a scope allows, unless one is given. Raises UsageError."""
    if scope.subset and (scope.quick or scope.rank is not None):
        raise UsageError(
            "--subset selects whose data is read: it cannot be combined with --quick or --rank"
        )
    deepest: Level = "files" if scope.quick else "numerics" if scope.is_everything else "weights"
    if level is None:
        return deepest
    if level not in LEVELS:
        raise UsageError(f"level {level!r}: it must be one of {', '.join(LEVELS)}")
    if LEVELS.index(level) > LEVELS.index(deepest):
        raise UsageError(
            f"--level {level} needs more data than --quick, --rank or --subset leave to be read"
        )
    return level


@dataclass(frozen=True, slots=True)
class _Request:
    """What to verify, against what, how deep, and how to run it."""

    folder: Path
    source: str | None
    level: Level
    scope: Scope
    revision: str | None
    allow_pickle: bool
    dtype: str | None
    device: str | None
    timeouts: Timeouts

    @property
    def runs_numerics(self) -> bool:
        """Whether the model will be run."""
        return self.level == "numerics" and self.source is not None


@dataclass(frozen=True, slots=True)
class _Run:
    """A verification with its source open, and torchrun's ranks if there are any."""

    request: _Request
    source: Checkpoint | None
    ranks: TorchrunRanks | None
    advance: Callable[[int], object]

    def checks(self) -> Iterator[Check]:
        """Each level that was asked for, in order."""
        request = self.request
        files = check_files(request.folder, self.advance, request.scope)
        yield files
        passed = files.verdict == "passed"
        if request.level != "files":
            yield self._check_weights(passed)
        if request.level == "numerics":
            yield self._check_numerics() if passed else Check("numerics", "not run", BAD_FILES)

    def _check_weights(self, files_passed: bool) -> Check:
        """The weights, even of damaged files, to tell which bytes differ from the source's."""
        if self.source is None:
            return Check("weights", "not run", NO_SOURCE if files_passed else BAD_FILES)
        try:
            return check_weights(self.request.folder, self.source, self.advance, self.request.scope)
        except ManifestError:
            if files_passed:
                raise
            return Check("weights", "not run", BAD_FILES)

    def _check_numerics(self) -> Check:
        if self.source is None:
            return Check("numerics", "not run", NO_SOURCE)
        from shardkit.runtime.engine.controller import RankController
        from shardkit.runtime.engine.rank_processes import RankProcesses
        from shardkit.verification.models import ShardedModel
        from shardkit.verification.numerics import check_numerics

        request, source = self.request, self.source
        manifest = read_manifest(request.folder)

        def check(ranks: RankController) -> Check:
            model, dtype = ShardedModel(ranks), _to_torch(request.dtype)
            return check_numerics(request.folder, manifest, source.folder, model, dtype)

        try:
            if self.ranks is not None:
                return check(self.ranks)
            with RankProcesses(manifest.tp_size, request.device, request.timeouts) as ranks:
                return check(ranks)
        except RanksLost:
            raise
        except CheckpointError as error:
            return Check("numerics", "failed", "the unsharded model does not run", (str(error),))
        except ShardkitError as error:
            return Check("numerics", "failed", "the shards do not run", (str(error),))


@contextmanager
def _open_source(request: _Request) -> Iterator[Checkpoint | None]:
    """The source, if there is one and a level needs it. Raises CheckpointError."""
    if request.source is None or request.level == "files":
        yield None
        return
    with open_source(request.source, request.revision, request.allow_pickle) as checkpoint:
        checkpoint.check_config()
        yield checkpoint


def _connect(request: _Request) -> TorchrunRanks:
    from shardkit.runtime.distributed.group import connect
    from shardkit.runtime.engine.controller import TorchrunRanks

    return TorchrunRanks(connect(request.device, request.timeouts))


def _count_bytes(request: _Request) -> int:
    """How many bytes will be read, as far as the manifest says; 0 if it cannot be read."""
    try:
        manifest = read_manifest(request.folder)
        ranks = request.scope.ranks_read(manifest.tp_size)
    except (ManifestError, LayoutError):
        return 0
    total = sum(manifest.ranks[rank].digest.size for rank in ranks)
    if request.source is None or request.level == "files":
        return total
    source_bytes = sum(placement.spec.nbytes for placement in manifest.plan.placements)
    return total * 2 + (0 if Path(request.source).is_dir() else source_bytes)


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """The name of a dtype that models compute in. Raises UsageError for any other."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}: it must be one of {', '.join(DTYPES)}")
    return name


def _to_torch(name: str | None) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype
