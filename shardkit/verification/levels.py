"""Runs the levels of a verification: as deep as asked for, and until one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.pickled.convert import open_source
from shardkit.errors import (
    CheckpointError,
    LayoutError,
    ManifestError,
    RanksLost,
    ShardkitError,
)
from shardkit.files import Progress, ProgressCallback, ignore_progress, track_progress
from shardkit.runtime.distributed.rank_environment import is_follower, is_rank
from shardkit.shards.manifest import Manifest
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts
from shardkit.verification.evidence import describe_split, identify_check, list_versions
from shardkit.verification.files import check_files
from shardkit.verification.numerics_options import DEFAULT_NUMERICS, NumericsOptions
from shardkit.verification.report import Check, Report
from shardkit.verification.request import (
    Level,
    Request,
    check_numerics_options,
    choose_level,
    name_dtype,
)
from shardkit.verification.scope import Scope
from shardkit.verification.weights import check_weights, prove_weights

if TYPE_CHECKING:
    import torch

    from shardkit.runtime.engine.controller import TorchrunRanks
    from shardkit.verification.block_journal import BlockJournal

NO_SOURCE = "only a comparison with the source shows that: name it with --against"
NOT_RIGHT = "the shards do not compute what the unsharded model does"
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
    numerics: NumericsOptions = DEFAULT_NUMERICS,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    progress: ProgressCallback | None = None,
) -> Report | None:
    """Verify a shard folder, and report what is wrong.

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
        numerics: How the last level is run: which ranks, in how much memory, on which blocks.
        timeouts: How long to wait for ranks.
        progress: Called with the bytes read so far and in all.

    Returns:
        The report. Under torchrun its ranks are used: every one calls this, and rank 0 gets it.

    Raises:
        ShardkitError: A UsageError, LayoutError, CheckpointError or RanksError.
    """
    scope, name = Scope(rank, subset, quick), None if source is None else str(source)
    request = Request(
        Path(shards), name, choose_level(scope, level), scope, revision, allow_pickle,
        name_dtype(dtype), device, check_numerics_options(numerics), timeouts,
    )  # fmt: skip
    return _run_request(request, progress)


def _run_request(request: Request, progress: ProgressCallback | None) -> Report | None:
    """Run the levels on torchrun's rank 0, or here; the other ranks follow it."""
    is_torchrun, manifest = is_rank(), _read_manifest(request)
    is_real = _choose_real_ranks(request, manifest)
    ranks = _connect(request) if is_torchrun and request.runs_numerics else None
    if is_follower():
        if ranks is not None:
            ranks.follow()
        return None
    try:
        with (
            _open_source(request) as checkpoint,
            _open_journal(request, manifest, checkpoint) as journal,
        ):
            advance = track_progress(_count_bytes(request, manifest), progress)
            run = _Run(request, manifest, checkpoint, is_real, ranks, journal, advance)
            if checkpoint is not None:
                checkpoint.check_download(advance)
            checks = tuple(run.checks())
            split = describe_split(manifest) if manifest else {}
            report = Report(str(request.folder), checks, split, list_versions())
            if journal is not None:
                journal.remove()
            return report
    finally:
        if ranks is not None:
            ranks.close()


@dataclass(frozen=True, slots=True)
class _Run:
    """A verification with its source open, and torchrun's ranks if there are any.

    `is_real` tells whether ranks are processes, or take turns.
    """

    request: Request
    manifest: Manifest | None
    source: Checkpoint | None
    is_real: bool
    ranks: TorchrunRanks | None
    journal: BlockJournal | None
    advance: Progress

    def checks(self) -> Iterator[Check]:
        """Each level that was asked for, in order."""
        request, weights = self.request, self._prove_weights()
        is_proven = weights is not None
        # What is wrong is looked for anew, level by level, beyond what was said to be read.
        progress = ignore_progress if self._is_one_pass else self.advance
        files = check_files(request.folder, progress, request.scope, self.manifest, is_proven)
        yield files
        passed = files.verdict == "passed"
        if request.level != "files":
            yield weights or self._check_weights(passed)
        if request.level == "numerics":
            yield from self._run_models() if passed else [Check("numerics", "not run", BAD_FILES)]

    @property
    def _is_one_pass(self) -> bool:
        """Whether files and weights are tried in one pass: most often nothing is wrong."""
        has_both = self.source is not None and self.manifest is not None
        return has_both and self.request.level != "files"

    def _prove_weights(self) -> Check | None:
        """The level weights, and the digests of files, in one pass; None if anything is wrong."""
        if not self._is_one_pass:
            return None
        assert self.manifest is not None
        assert self.source is not None
        folder, scope = self.request.folder, self.request.scope
        return prove_weights(folder, self.manifest, self.source, self.advance, scope)

    def _check_weights(self, files_passed: bool) -> Check:
        """The weights, even of damaged files, to tell which bytes differ from the source's."""
        if self.source is None:
            return Check("weights", "not run", NO_SOURCE if files_passed else BAD_FILES)
        folder, scope = self.request.folder, self.request.scope
        try:
            return check_weights(folder, self.source, ignore_progress, scope)
        except ManifestError:
            if files_passed:
                raise
            return Check("weights", "not run", BAD_FILES)

    def _run_models(self) -> Iterator[Check]:
        """The numerics; if they are right, and that is asked for, those of rounded sums, too."""
        numerics = self._check_numerics()
        yield numerics
        if self.request.numerics.reduce_dtype is not None:
            is_right = numerics.verdict == "passed"
            yield self._check_sums() if is_right else Check("sums", "not run", NOT_RIGHT)

    def _check_sums(self) -> Check:
        from shardkit.verification.rounded_check import check_rounded_sums

        assert self.source is not None
        request, options = self.request, self.request.numerics
        manifest, dtype = read_manifest(request.folder), _to_torch(request.dtype)
        sent = _to_torch(options.reduce_dtype)
        assert sent is not None
        folders = request.folder, manifest, self.source.folder
        return check_rounded_sums(*folders, sent, dtype, options)

    def _check_numerics(self) -> Check:
        if self.source is None:
            return Check("numerics", "not run", NO_SOURCE)
        from shardkit.runtime.engine.rank_processes import RankProcesses
        from shardkit.verification.block_check import check_blocks
        from shardkit.verification.rank_choice import check_on_ranks

        request, source = self.request, self.source
        manifest, dtype = read_manifest(request.folder), _to_torch(request.dtype)
        split = request.folder, manifest, source.folder, dtype
        try:
            if not self.is_real:
                return check_blocks(*split, request.numerics, self.journal)
            if self.ranks is not None:
                return check_on_ranks(*split, self.ranks, request.numerics)
            with RankProcesses(manifest.tp_size, request.device, request.timeouts) as ranks:
                return check_on_ranks(*split, ranks, request.numerics)
        except RanksLost:
            raise
        except CheckpointError as error:
            return Check("numerics", "failed", "the unsharded model does not run", (str(error),))
        except ShardkitError as error:
            return Check("numerics", "failed", "the shards do not run", (str(error),))


def _read_manifest(request: Request) -> Manifest | None:
    """The manifest; None if it cannot be read, of which the level files will say more."""
    try:
        return read_manifest(request.folder)
    except (ManifestError, LayoutError):
        return None


def _choose_real_ranks(request: Request, manifest: Manifest | None) -> bool:
    """Whether ranks will be processes. Raises UsageError if what is chosen has not the memory."""
    if manifest is None or not request.runs_numerics:
        return True
    from shardkit.verification.rank_choice import choose_real_ranks

    options, dtype, device = request.numerics, request.dtype, request.device
    return choose_real_ranks(request.folder, manifest, options, dtype, device)


@contextmanager
def _open_source(request: Request) -> Iterator[Checkpoint | None]:
    """The source, if there is one and a level needs it. Raises CheckpointError."""
    if request.source is None or request.level == "files":
        yield None
        return
    with open_source(request.source, request.revision, request.allow_pickle) as checkpoint:
        checkpoint.check_config()
        yield checkpoint


@contextmanager
def _open_journal(
    request: Request, manifest: Manifest | None, source: Checkpoint | None
) -> Iterator[BlockJournal | None]:
    """The journal to resume from, if one is asked for and the model will run."""
    path = request.numerics.resume
    if path is None or manifest is None or source is None or not request.runs_numerics:
        yield None
        return
    from shardkit.verification.block_journal import open_journal

    identity = identify_check(manifest, source, request.dtype, request.numerics)
    with open_journal(path, identity) as journal:
        yield journal


def _connect(request: Request) -> TorchrunRanks:
    from shardkit.runtime.distributed.connect import connect
    from shardkit.runtime.engine.controller import TorchrunRanks

    return TorchrunRanks(connect(request.device, request.timeouts))


def _count_bytes(request: Request, manifest: Manifest | None) -> int:
    """How many bytes will be read, as far as the manifest says; 0 if it cannot be read."""
    if manifest is None:
        return 0
    try:
        ranks = request.scope.ranks_read(manifest.tp_size)
    except LayoutError:
        return 0
    total = sum(manifest.ranks[rank].digest.size for rank in ranks)
    if request.source is None or request.level == "files":
        return total
    source_bytes = sum(placement.spec.nbytes for placement in manifest.plan.placements)
    return total + (0 if Path(request.source).is_dir() else source_bytes)


def _to_torch(name: str | None) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype
