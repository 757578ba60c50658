"""Split a checkpoint, merge a shard folder, reshard one: all of them one streaming copy.

A merge is a split over the source's own files, and a reshard is a split of a split: both read the
shard folder as a checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from shardkit import __version__
from shardkit.checkpoint import Checkpoint, Source
from shardkit.checkpoint.checkpoint import MAX_COMPANION
from shardkit.checkpoint.header import header_bytes
from shardkit.checkpoint.index import index_bytes
from shardkit.convert.replaceable import merge_target, shard_target
from shardkit.errors import CheckpointError, ManifestError
from shardkit.files import read_small
from shardkit.layout.spans import Span
from shardkit.output.destination import Target, as_output_error
from shardkit.output.journal import Run
from shardkit.output.nonfinite import nonfinite_text
from shardkit.output.publish import Stage, publishing
from shardkit.output.resume import Files, OutputFile, left, make_run, open_sinks, total_size
from shardkit.output.stream import Job, Progress, copy
from shardkit.output.writer import FileSink
from shardkit.planning.plan import Placement, Plan
from shardkit.recipe.recipe import Recipe
from shardkit.shards.integrity import check_ranks
from shardkit.shards.manifest import (
    MARK,
    NAME,
    Digest,
    Manifest,
    Piece,
    RankFile,
    SourceRecord,
    make_split_id,
    rank_name,
    shard_metadata,
    stored_order,
    stored_specs,
)
from shardkit.shards.reader import ShardedCheckpoint


def no_progress(_: int) -> None:
    """For callers without a progress bar."""


def split(
    source: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    out: Path,
    progress: Progress = no_progress,
    *,
    force: bool = False,
    resume: bool = False,
    finite: bool = False,
) -> Manifest:
    """Write one file per rank, the companion files, and the manifest last.

    `force` replaces a shard folder that is there, in one step; `resume` goes on with what a stopped
    run to `out` has left; `finite` refuses weights of which a value is NaN or infinite.  Raises
    OutputError, SourceChanged or CheckpointError; then nothing is left behind.
    """
    target = shard_target(out, force, resume)
    target.check()
    sample = source.sample()
    record = SourceRecord(
        source.name, source.revision, source.model_type, sample, source.files, source.index
    )
    draft = Manifest(
        make_split_id(plan, sample, recipe.sha256), plan, record, recipe.name, recipe.sha256,
        (), {}, __version__,
    )  # fmt: skip
    files = _rank_files(draft)
    run = make_run(draft.split_id, source.state(), files)
    target.check_space(total_size(files) + beside(source))
    source.check_download(progress)
    with _writing(target, run, files, progress) as (stage, sinks):
        copied = _write_companions(stage, source.companions())
        _fill(stage, files, sinks, source, _rank_jobs(plan), progress)
        source.check_unchanged()
        if finite:
            _check_finite(source, sinks)
        return _write_manifest(stage, draft, sinks, copied)


def reshard(
    shards: ShardedCheckpoint,
    tp_size: int,
    out: Path,
    progress: Progress = no_progress,
    *,
    force: bool = False,
    resume: bool = False,
) -> Manifest:
    """Cut a shard folder for another number of ranks: byte for byte what a direct split writes.

    The shards are checked first.  `force` and `resume` as for a split.  Raises OutputError,
    LayoutError, or VerifyError for damage.
    """
    target = shard_target(out, force, resume)
    target.check()
    check_ranks(shards, progress)
    old = shards.manifest
    plan = old.plan.over(tp_size)
    split_id = make_split_id(plan, old.source.sample, old.recipe_sha256)
    draft = replace(old, split_id=split_id, plan=plan, ranks=(), shardkit=__version__)
    files = _rank_files(draft)
    run = make_run(split_id, old.sha256, files)
    target.check_space(total_size(files) + sum(d.size for d in old.copied.values()))
    with _writing(target, run, files, progress) as (stage, sinks):
        copied = _write_companions(stage, _copied(shards))
        _fill(stage, files, sinks, shards, _rank_jobs(plan), progress)
        return _write_manifest(stage, draft, sinks, copied)


def merge(
    shards: ShardedCheckpoint,
    out: Path,
    progress: Progress = no_progress,
    *,
    force: bool = False,
    resume: bool = False,
) -> None:
    """Write the unsharded checkpoint again, in the source's own files, names and metadata.

    The shards are checked first.  `force` replaces a folder that holds only files which this merge
    writes; `resume` as for a split.  Raises OutputError, or VerifyError for damage.
    """
    target = merge_target(shards.manifest, out, force, resume)
    target.check()
    check_ranks(shards, progress)
    manifest, index = shards.manifest, shards.manifest.source.index
    files = _source_files(manifest)
    run = make_run(manifest.split_id, manifest.sha256, files)
    target.check_space(total_size(files) + sum(d.size for d in manifest.copied.values()))
    with _writing(target, run, files, progress) as (stage, sinks):
        _write_companions(stage, _copied(shards))
        _fill(stage, files, sinks, shards, _source_jobs(manifest), progress)
        if index:
            total = sum(placement.spec.nbytes for placement in manifest.plan.placements)
            stage.write(index.name, index_bytes(index, total))


def beside(source: Checkpoint) -> int:
    """The bytes of the companion files."""
    return sum(len(data) for _, data in source.companions())


@contextmanager
def _writing(
    target: Target, run: Run, files: Files, progress: Progress
) -> Iterator[tuple[Stage, list[FileSink]]]:
    """A stage with the files begun, to be published when the block ends well."""
    with publishing(target) as stage:
        yield stage, open_sinks(stage, run, files, progress)


def _rank_files(draft: Manifest) -> dict[str, OutputFile]:
    """Every rank's file, by name."""
    plan, files = draft.plan, {}
    for tp_rank in range(plan.tp_size):
        held = stored_specs(plan, tp_rank)
        metadata = shard_metadata(draft.split_id, tp_rank, plan.tp_size)
        files[rank_name(tp_rank, plan.tp_size)] = OutputFile(header_bytes(held, metadata), held)
    return files


def _rank_jobs(plan: Plan) -> list[Job]:
    return [Job(p.spec, p.dim, takes(p, plan.tp_size)) for p in stored_order(plan.placements)]


def _source_files(manifest: Manifest) -> dict[str, OutputFile]:
    """Every file of the source, by name."""
    files = {}
    for file in manifest.source.files:
        held = [manifest.placements[name].spec for name in file.tensors]
        files[file.name] = OutputFile(header_bytes(held, file.metadata), held)
    return files


def _source_jobs(manifest: Manifest) -> list[Job]:
    placed = manifest.placements
    return [
        Job(placed[name].spec, placed[name].dim, ((at, placed[name].spans(0, 1)),))
        for at, file in enumerate(manifest.source.files)
        for name in file.tensors
    ]


def takes(placement: Placement, tp_size: int) -> tuple[tuple[int, tuple[Span, ...]], ...]:
    """The spans each rank takes of a tensor, of the ranks that store it."""
    return tuple(
        (tp_rank, placement.spans(tp_rank, tp_size))
        for tp_rank in range(tp_size)
        if placement.shard(tp_rank, tp_size) is not None
    )


def _fill(
    stage: Stage,
    files: Files,
    sinks: Sequence[FileSink],
    source: Source,
    jobs: Sequence[Job],
    progress: Progress,
) -> None:
    """Copy what is left of the jobs into the sinks, and sync their files."""
    with as_output_error(stage.folder):
        copy(source, list(left(jobs, sinks)), sinks, progress)
    stage.finish_all(files)


def _check_finite(source: Checkpoint, sinks: Iterable[FileSink]) -> None:
    found = {name: count for sink in sinks for name, count in sink.nonfinite.items()}
    if found:
        raise CheckpointError(
            f"{source.folder}: {nonfinite_text(found)}; leave out --fail-on-nonfinite to copy them"
            " as they are"
        )


def _write_companions(stage: Stage, files: Iterable[tuple[str, bytes]]) -> dict[str, Digest]:
    copied = {}
    for name, data in files:
        stage.write(name, data)
        copied[name] = Digest(len(data), sha256(data).hexdigest())
    return copied


def _write_manifest(
    stage: Stage, draft: Manifest, sinks: Iterable[FileSink], copied: Mapping[str, Digest]
) -> Manifest:
    """Write the manifest; `draft` lacks what only the copy could tell."""
    names = (rank_name(tp_rank, draft.tp_size) for tp_rank in range(draft.tp_size))
    ranks = tuple(_rank_file(*pair) for pair in zip(names, sinks, strict=True))
    manifest = replace(draft, ranks=ranks, copied=copied)
    stage.write(NAME, manifest.data)
    return manifest


def _copied(shards: ShardedCheckpoint) -> Iterable[tuple[str, bytes]]:
    """The companion files of a shard folder, checked.  Raises ManifestError."""
    for name, digest in shards.manifest.copied.items():
        data = read_small(shards.folder / name, MAX_COMPANION, ManifestError)
        if Digest(len(data), sha256(data).hexdigest()) != digest:
            raise ManifestError(f"{shards.folder / name}: not the file that was copied")
        yield name, data


def _rank_file(name: str, sink: FileSink) -> RankFile:
    pieces = {tensor: Piece(at, end[:MARK]) for tensor, (at, end) in sink.marks.items()}
    return RankFile(name, Digest(sink.size, sink.sha256), pieces, sink.nonfinite)
