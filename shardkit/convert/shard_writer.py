"""Split a checkpoint, and reshard a shard folder: one streaming copy into one file per rank.

A reshard is a split of a split: it reads the shard folder as a checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardkit import __version__
from shardkit.checkpoint import Checkpoint, encode_header, open_source, read_config
from shardkit.convert.copy_memory import choose_buffer_bytes, measure_replicas
from shardkit.convert.replaceable import shard_destination
from shardkit.convert.steps import (
    copy_into,
    copy_shards_into,
    count_companion_bytes,
    open_output,
    read_shard_companions,
    write_companions,
)
from shardkit.errors import CheckpointError
from shardkit.files import Progress, ProgressCallback, ignore_progress, track_progress
from shardkit.output import (
    Destination,
    FileWriter,
    Inspection,
    OutputFile,
    PlainReader,
    StagingFolder,
    TensorCopy,
    count_file_bytes,
    describe_nonfinite,
    identify_run,
)
from shardkit.planning import Plan, generates_text, plan_for, summarize_plan
from shardkit.recipe import Recipe
from shardkit.shards import (
    MANIFEST_NAME,
    PREFIX_DIGITS,
    Digest,
    Manifest,
    Piece,
    RankFile,
    ShardedCheckpoint,
    SourceRecord,
    encode_manifest,
    hash_manifest,
    make_shard_metadata,
    make_split_id,
    rank_file_name,
)


@dataclass(frozen=True)
class SplitResult:
    """A finished split or reshard.

    Attributes:
        out: The shard folder.
        plan: Where every tensor lies.
        manifest: What was written; None if nothing was, in a dry run.
        warnings: What is wrong with the source and does no harm, a line each.
        generates_text: Whether the model produces text; an encoder alone does not.
    """

    out: Path
    plan: Plan
    manifest: Manifest | None
    warnings: tuple[str, ...] = ()
    generates_text: bool = False


def split(
    source: str | Path,
    out: str | Path,
    tp_size: int,
    *,
    recipe: str | Recipe | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    expert_parallel: bool = False,
    force: bool = False,
    resume: bool = False,
    fail_on_nonfinite: bool = False,
    dry_run: bool = False,
    max_memory: int | None = None,
    progress: ProgressCallback | None = None,
) -> SplitResult:
    """Split a checkpoint, in constant memory: `shardkit.split("models/llama", "llama-tp4", 4)`.

    Args:
        source: A folder of safetensors files with its config.json, or a Hub id.
        out: The new shard folder, complete or absent.
        tp_size: The number of ranks.
        recipe: A recipe, or the name or file of one, instead of the one for the model_type.
        revision: A branch, tag or commit of a Hub repository.
        allow_pickle: Convert pickled `.bin` weights if there are no others.
        expert_parallel: Whether each rank gets whole experts, instead of a part of every one.
        force: Whether to replace a shard folder that is there, in one step.
        resume: Whether to resume an interrupted run, and keep partial output if interrupted again.
        fail_on_nonfinite: Whether to refuse weights of which a value is NaN or infinite.
        dry_run: Whether to check everything and write nothing.
        max_memory: Bytes that this process may take; by default what is free, less a tenth.
        progress: Called with the bytes done and the bytes in all.

    Raises:
        ShardkitError: Any but ManifestError, VerifyError and RanksError.
    """
    destination = shard_destination(Path(out), force, resume)
    destination.check()
    with open_source(source, revision, allow_pickle, max_memory) as checkpoint:
        used, plan = plan_for(checkpoint, tp_size, recipe, expert_parallel)
        advance, buffer = _check_room(checkpoint, plan, destination, max_memory, progress)
        manifest = None if dry_run else split_checkpoint(
            checkpoint, plan, used, destination, advance, fail_on_nonfinite, buffer
        )  # fmt: skip
        return _describe_result(checkpoint, plan, destination.out, manifest)


def reshard(
    shards: str | Path,
    out: str | Path,
    tp_size: int,
    *,
    force: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    progress: ProgressCallback | None = None,
) -> SplitResult:
    """Cut a shard folder for another number of ranks: byte for byte what a direct split writes.

    Args:
        shards: A shard folder. Every byte of it is checked before the output is there.
        out: The new shard folder; with `force` it may be `shards` itself.
        tp_size: The new number of ranks.
        force: As for `split`.
        resume: As for `split`.
        max_memory: As for `split`.
        progress: As for `split`.

    Raises:
        ManifestError: If `shards` is missing, unfinished or damaged.
        VerifyError: If a shard's bytes are not those that were written.
        LayoutError: If the checkpoint cannot be divided over so many ranks.
        OutputError: If the output exists, cannot be written, or has no room.
        UsageError: If it needs more memory than is allowed.
    """
    with ShardedCheckpoint(Path(shards)) as opened:
        old_plan = opened.manifest.plan
        new_plan = old_plan.with_tp_size(tp_size)
        makes_text = generates_text(old_plan, read_config(opened.folder))
        total = sum(summarize_plan(old_plan).stored_bytes)
        total += sum(summarize_plan(new_plan).stored_bytes)
        destination = shard_destination(Path(out), force, resume)
        advance = track_progress(total, progress)
        buffer_bytes = _choose_buffer_bytes(
            "reshard", new_plan, max_memory, measure_replicas(old_plan)
        )
        manifest = reshard_shards(opened, tp_size, destination, advance, buffer_bytes)
    return SplitResult(Path(out), manifest.plan, manifest, (), makes_text)


def split_checkpoint(
    source: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    destination: Destination,
    progress: Progress = ignore_progress,
    fail_on_nonfinite: bool = False,
    buffer_bytes: int | None = None,
) -> Manifest:
    """As `split`, of an open checkpoint by a plan of it: one file per rank, the manifest last.

    Raises OutputError, SourceChanged or CheckpointError; then nothing is left behind.
    """
    fingerprint = source.fingerprint()
    split_id = make_split_id(plan, fingerprint, recipe.sha256)
    record = SourceRecord(
        source.name, source.revision, source.model_type, fingerprint, source.files, source.index
    )
    draft = Manifest(split_id, plan, record, recipe.name, recipe.sha256, (), {}, __version__)
    files = _plan_rank_files(draft)
    run = identify_run(split_id, source.digest_stats(), files)
    destination.check_space(count_file_bytes(files) + source.count_companion_bytes())
    source.check_download(progress)
    with open_output(destination, run, files, progress) as (stage, writers):
        companions = write_companions(stage, source.companions())
        copies = _plan_rank_copies(draft)
        copy_into(stage, files, writers, PlainReader(source), copies, progress, buffer_bytes)
        source.check_unchanged()
        if fail_on_nonfinite:
            _check_finite(source, writers)
        return _write_manifest(stage, draft, writers, companions)


def _check_room(
    source: Checkpoint,
    plan: Plan,
    destination: Destination,
    max_memory: int | None,
    progress: ProgressCallback | None,
) -> tuple[Progress, int]:
    """What adds up the bytes that a split checks and writes, and the bytes of its buffers.

    Raises OutputError or UsageError if there is no room for them.
    """
    nbytes = sum(summarize_plan(plan).stored_bytes)
    destination.check_space(nbytes + source.count_companion_bytes())
    buffer_bytes = _choose_buffer_bytes("split", plan, max_memory)
    return track_progress(source.download_bytes + nbytes, progress), buffer_bytes


def _choose_buffer_bytes(
    what: str, plan: Plan, max_memory: int | None, replicas: float = 0.0
) -> int:
    pieces = len(plan.placements) * plan.mesh.world_size
    return choose_buffer_bytes(what, pieces, max_memory, replicas)


def _describe_result(
    source: Checkpoint, plan: Plan, out: Path, manifest: Manifest | None
) -> SplitResult:
    warnings = source.warnings
    if manifest is not None and manifest.nonfinite:
        warnings = (*warnings, f"{describe_nonfinite(manifest.nonfinite)}; copied as they are")
    return SplitResult(out, plan, manifest, warnings, generates_text(plan, source.config))


def reshard_shards(
    shards: ShardedCheckpoint,
    tp_size: int,
    destination: Destination,
    progress: Progress = ignore_progress,
    buffer_bytes: int | None = None,
) -> Manifest:
    """As `reshard`, of an open shard folder."""
    destination.check()
    old = shards.manifest
    plan = old.plan.with_tp_size(tp_size)
    split_id = make_split_id(plan, old.source.fingerprint, old.recipe_sha256)
    draft = replace(old, split_id=split_id, plan=plan, ranks=(), shardkit=__version__)
    files = _plan_rank_files(draft)
    run = identify_run(split_id, hash_manifest(old), files)
    destination.check_space(count_file_bytes(files) + count_companion_bytes(old))
    counted = Inspection(counted=old.nonfinite)
    with open_output(destination, run, files, progress, counted) as (stage, writers):
        companions = write_companions(stage, read_shard_companions(shards))
        copies = _plan_rank_copies(draft)
        copy_shards_into(stage, files, writers, shards, copies, progress, buffer_bytes)
        return _write_manifest(stage, draft, writers, companions)


def _plan_rank_files(draft: Manifest) -> dict[str, OutputFile]:
    """Every rank's file, by name."""
    files = {}
    for rank in draft.mesh.ranks():
        specs = draft.stored_specs(rank)
        header = encode_header(specs, make_shard_metadata(draft.split_id, rank))
        files[rank_file_name(rank)] = OutputFile(header, specs)
    return files


def _plan_rank_copies(draft: Manifest) -> list[TensorCopy]:
    return [TensorCopy(p.spec, p.dim, p.destinations(draft.mesh)) for p in draft.storage_order]


def _check_finite(source: Checkpoint, writers: Iterable[FileWriter]) -> None:
    counts = {name: count for writer in writers for name, count in writer.nonfinite.items()}
    if counts:
        raise CheckpointError(
            f"{source.folder}: {describe_nonfinite(counts)}; leave out --fail-on-nonfinite to copy"
            " them as they are"
        )


def _write_manifest(
    stage: StagingFolder,
    draft: Manifest,
    writers: Iterable[FileWriter],
    companions: Mapping[str, Digest],
) -> Manifest:
    """Write the manifest; `draft` lacks what only the copy could tell."""
    names = map(rank_file_name, draft.mesh.ranks())
    rank_files = tuple(map(_make_rank_file, names, writers))
    manifest = replace(draft, ranks=rank_files, companion_files=companions)
    stage.write(MANIFEST_NAME, encode_manifest(manifest))
    return manifest


def _make_rank_file(name: str, writer: FileWriter) -> RankFile:
    pieces = {
        tensor: Piece(offset, sha256[:PREFIX_DIGITS])
        for tensor, (offset, sha256) in writer.prefix_digests.items()
    }
    return RankFile(name, Digest(writer.size, writer.sha256), pieces, writer.nonfinite)
