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
from shardkit.checkpoint.header import encode_header
from shardkit.checkpoint.index import encode_index
from shardkit.convert.replaceable import merge_destination, shard_destination
from shardkit.errors import CheckpointError, ManifestError
from shardkit.files import read_small_file
from shardkit.layout.spans import Span
from shardkit.output.destination import Destination, as_output_error
from shardkit.output.journal import RunIdentity
from shardkit.output.nonfinite import describe_nonfinite
from shardkit.output.publish import StagingFolder, publish_folder
from shardkit.output.resume import (
    Files,
    OutputFile,
    count_file_bytes,
    identify_run,
    open_writers,
    remaining_copies,
)
from shardkit.output.stream import Progress, TensorCopy, copy_tensors
from shardkit.output.writer import FileWriter
from shardkit.planning.plan import Placement, Plan
from shardkit.recipe.recipe import Recipe
from shardkit.shards.integrity import check_ranks
from shardkit.shards.manifest import (
    MANIFEST_NAME,
    PREFIX_DIGITS,
    Digest,
    Manifest,
    Piece,
    RankFile,
    SourceRecord,
    list_stored_specs,
    make_shard_metadata,
    make_split_id,
    rank_file_name,
    sort_for_storage,
)
from shardkit.shards.reader import ShardedCheckpoint


def no_progress(_: int) -> None:
    """For callers without a progress bar."""


def split_checkpoint(
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
    target = shard_destination(out, force, resume)
    target.check()
    sample = source.fingerprint()
    record = SourceRecord(
        source.name, source.revision, source.model_type, sample, source.files, source.index
    )
    draft = Manifest(
        make_split_id(plan, sample, recipe.sha256), plan, record, recipe.name, recipe.sha256,
        (), {}, __version__,
    )  # fmt: skip
    files = _plan_rank_files(draft)
    run = identify_run(draft.split_id, source.digest_stats(), files)
    target.check_space(count_file_bytes(files) + count_companion_bytes(source))
    source.check_download(progress)
    with _open_output(target, run, files, progress) as (stage, sinks):
        copied = _write_companions(stage, source.companions())
        _copy_remaining(stage, files, sinks, source, _plan_rank_copies(plan), progress)
        source.check_unchanged()
        if finite:
            _check_finite(source, sinks)
        return _write_manifest(stage, draft, sinks, copied)


def reshard_shards(
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
    target = shard_destination(out, force, resume)
    target.check()
    check_ranks(shards, progress)
    old = shards.manifest
    plan = old.plan.with_tp_size(tp_size)
    split_id = make_split_id(plan, old.source.fingerprint, old.recipe_sha256)
    draft = replace(old, split_id=split_id, plan=plan, ranks=(), shardkit=__version__)
    files = _plan_rank_files(draft)
    run = identify_run(split_id, old.sha256, files)
    target.check_space(count_file_bytes(files) + sum(d.size for d in old.companion_files.values()))
    with _open_output(target, run, files, progress) as (stage, sinks):
        copied = _write_companions(stage, _read_companions(shards))
        _copy_remaining(stage, files, sinks, shards, _plan_rank_copies(plan), progress)
        return _write_manifest(stage, draft, sinks, copied)


def merge_shards(
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
    target = merge_destination(shards.manifest, out, force, resume)
    target.check()
    check_ranks(shards, progress)
    manifest, index = shards.manifest, shards.manifest.source.index
    files = _plan_source_files(manifest)
    run = identify_run(manifest.split_id, manifest.sha256, files)
    target.check_space(
        count_file_bytes(files) + sum(d.size for d in manifest.companion_files.values())
    )
    with _open_output(target, run, files, progress) as (stage, sinks):
        _write_companions(stage, _read_companions(shards))
        _copy_remaining(stage, files, sinks, shards, _plan_source_copies(manifest), progress)
        if index:
            total = sum(placement.spec.nbytes for placement in manifest.plan.placements)
            stage.write(index.name, encode_index(index, total))


def count_companion_bytes(source: Checkpoint) -> int:
    """The bytes of the companion files."""
    return sum(len(data) for _, data in source.companions())


@contextmanager
def _open_output(
    target: Destination, run: RunIdentity, files: Files, progress: Progress
) -> Iterator[tuple[StagingFolder, list[FileWriter]]]:
    """A stage with the files begun, to be published when the block ends well."""
    with publish_folder(target) as stage:
        yield stage, open_writers(stage, run, files, progress)


def _plan_rank_files(draft: Manifest) -> dict[str, OutputFile]:
    """Every rank's file, by name."""
    plan, files = draft.plan, {}
    for tp_rank in range(plan.tp_size):
        held = list_stored_specs(plan, tp_rank)
        metadata = make_shard_metadata(draft.split_id, tp_rank, plan.tp_size)
        files[rank_file_name(tp_rank, plan.tp_size)] = OutputFile(
            encode_header(held, metadata), held
        )
    return files


def _plan_rank_copies(plan: Plan) -> list[TensorCopy]:
    return [
        TensorCopy(p.spec, p.dim, takes(p, plan.tp_size)) for p in sort_for_storage(plan.placements)
    ]


def _plan_source_files(manifest: Manifest) -> dict[str, OutputFile]:
    """Every file of the source, by name."""
    files = {}
    for file in manifest.source.files:
        held = [manifest.placements[name].spec for name in file.tensors]
        files[file.name] = OutputFile(encode_header(held, file.metadata), held)
    return files


def _plan_source_copies(manifest: Manifest) -> list[TensorCopy]:
    placed = manifest.placements
    return [
        TensorCopy(placed[name].spec, placed[name].dim, ((at, placed[name].spans(0, 1)),))
        for at, file in enumerate(manifest.source.files)
        for name in file.tensors
    ]


def takes(placement: Placement, tp_size: int) -> tuple[tuple[int, tuple[Span, ...]], ...]:
    """The spans each rank takes of a tensor, of the ranks that store it."""
    return tuple(
        (tp_rank, placement.spans(tp_rank, tp_size))
        for tp_rank in range(tp_size)
        if placement.shard_spec(tp_rank, tp_size) is not None
    )


def _copy_remaining(
    stage: StagingFolder,
    files: Files,
    sinks: Sequence[FileWriter],
    source: Source,
    jobs: Sequence[TensorCopy],
    progress: Progress,
) -> None:
    """Copy what is left of the jobs into the sinks, and sync their files."""
    with as_output_error(stage.folder):
        copy_tensors(source, list(remaining_copies(jobs, sinks)), sinks, progress)
    stage.sync_files(files)


def _check_finite(source: Checkpoint, sinks: Iterable[FileWriter]) -> None:
    found = {name: count for sink in sinks for name, count in sink.nonfinite.items()}
    if found:
        raise CheckpointError(
            f"{source.folder}: {describe_nonfinite(found)}; leave out --fail-on-nonfinite to copy them"
            " as they are"
        )


def _write_companions(
    stage: StagingFolder, files: Iterable[tuple[str, bytes]]
) -> dict[str, Digest]:
    copied = {}
    for name, data in files:
        stage.write(name, data)
        copied[name] = Digest(len(data), sha256(data).hexdigest())
    return copied


def _write_manifest(
    stage: StagingFolder, draft: Manifest, sinks: Iterable[FileWriter], copied: Mapping[str, Digest]
) -> Manifest:
    """Write the manifest; `draft` lacks what only the copy could tell."""
    names = (rank_file_name(tp_rank, draft.tp_size) for tp_rank in range(draft.tp_size))
    ranks = tuple(_make_rank_file(*pair) for pair in zip(names, sinks, strict=True))
    manifest = replace(draft, ranks=ranks, companion_files=copied)
    stage.write(MANIFEST_NAME, manifest.data)
    return manifest


def _read_companions(shards: ShardedCheckpoint) -> Iterable[tuple[str, bytes]]:
    """The companion files of a shard folder, checked.  Raises ManifestError."""
    for name, digest in shards.manifest.companion_files.items():
        data = read_small_file(shards.folder / name, MAX_COMPANION, ManifestError)
        if Digest(len(data), sha256(data).hexdigest()) != digest:
            raise ManifestError(f"{shards.folder / name}: not the file that was copied")
        yield name, data


def _make_rank_file(name: str, sink: FileWriter) -> RankFile:
    pieces = {
        tensor: Piece(at, end[:PREFIX_DIGITS]) for tensor, (at, end) in sink.prefix_digests.items()
    }
    return RankFile(name, Digest(sink.size, sink.sha256), pieces, sink.nonfinite)
