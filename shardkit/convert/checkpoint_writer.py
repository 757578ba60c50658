"""Merge a shard folder: a split over the source's own files."""

from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint import encode_header, encode_index
from shardkit.convert.copy_memory import choose_buffer_bytes, measure_replicas
from shardkit.convert.replaceable import merge_destination
from shardkit.convert.steps import (
    copy_shards_into,
    count_companion_bytes,
    open_output,
    read_shard_companions,
    write_companions,
)
from shardkit.files import Progress, ProgressCallback, ignore_progress, track_progress
from shardkit.output import (
    Destination,
    Inspection,
    OutputFile,
    TensorCopy,
    count_file_bytes,
    identify_run,
)
from shardkit.planning import Mesh, summarize_plan
from shardkit.shards import Manifest, ShardedCheckpoint, hash_manifest

WHOLE = Mesh(1).rank(0)


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge.

    Attributes:
        out: The checkpoint's folder.
        files: Its weights files.
        nbytes: The bytes of its tensors.
    """

    out: Path
    files: tuple[str, ...]
    nbytes: int


def merge(
    shards: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    progress: ProgressCallback | None = None,
) -> MergeResult:
    """Write the unsharded checkpoint again, in the source's own files, names and metadata.

    Args:
        shards: A shard folder. Every byte of it is checked before the output is there.
        out: The new folder.
        force: Whether to replace a folder that holds only files which this merge writes.
        resume: Whether to resume an interrupted run, and keep partial output if interrupted again.
        max_memory: Bytes that this process may take; by default what is free, less a tenth.
        progress: Called with the bytes done and the bytes in all.

    Raises:
        ManifestError: If `shards` is missing, unfinished or damaged.
        VerifyError: If a shard's bytes are not those that were written.
        OutputError: If the output exists, cannot be written, or has no room.
        UsageError: If it needs more memory than is allowed.

    Example:
        >>> merge("llama-tp4", "llama-again").files  # doctest: +SKIP
    """
    with ShardedCheckpoint(Path(shards)) as opened:
        summary = summarize_plan(opened.manifest.plan)
        advance = track_progress(sum(summary.stored_bytes) + summary.total_bytes, progress)
        destination = merge_destination(opened.manifest, Path(out), force, resume)
        pieces, replicas = len(opened.manifest.placements), measure_replicas(opened.manifest.plan)
        buffer_bytes = choose_buffer_bytes("merge", pieces, max_memory, replicas)
        merge_shards(opened, destination, advance, buffer_bytes)
        names = tuple(file.name for file in opened.manifest.source.files)
    return MergeResult(Path(out), names, summary.total_bytes)


def merge_shards(
    shards: ShardedCheckpoint,
    destination: Destination,
    progress: Progress = ignore_progress,
    buffer_bytes: int | None = None,
) -> None:
    """As `merge`, of an open shard folder."""
    manifest, index = shards.manifest, shards.manifest.source.index
    destination.check()
    files = _plan_source_files(manifest)
    run = identify_run(manifest.split_id, hash_manifest(manifest), files)
    destination.check_space(count_file_bytes(files) + count_companion_bytes(manifest))
    unread = Inspection(digests=False, counted=())  # what is written is hashed as it is read
    with open_output(destination, run, files, progress, unread) as (stage, writers):
        write_companions(stage, read_shard_companions(shards))
        copies = _plan_source_copies(manifest)
        copy_shards_into(stage, files, writers, shards, copies, progress, buffer_bytes)
        if index:
            total = sum(placement.spec.nbytes for placement in manifest.plan.placements)
            stage.write(index.name, encode_index(index, total))


def _plan_source_files(manifest: Manifest) -> dict[str, OutputFile]:
    """Every file of the source, by name."""
    files = {}
    for file in manifest.source.files:
        specs = [manifest.placements[name].spec for name in file.tensors]
        files[file.name] = OutputFile(encode_header(specs, file.metadata), specs)
    return files


def _plan_source_copies(manifest: Manifest) -> list[TensorCopy]:
    """Every tensor as one rank alone holds it, to the file that it came from."""
    copies = []
    for writer, file in enumerate(manifest.source.files):
        for name in file.tensors:
            placement = manifest.placements[name]
            destinations = ((writer, placement.spans(WHOLE)),)
            copies.append(TensorCopy(placement.spec, placement.dim, destinations))
    return copies
