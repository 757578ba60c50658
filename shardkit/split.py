"""Split a checkpoint, merge a shard folder, reshard one: all of them one streaming copy.

A merge is a split over the source's own files, and a reshard is a split of a split: both read the
shard folder as a checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from shardkit import __version__
from shardkit.checkpoint import Checkpoint, Source
from shardkit.checkpoint.folder import MAX_COMPANION
from shardkit.checkpoint.header import header_bytes
from shardkit.checkpoint.index import index_bytes
from shardkit.errors import ManifestError
from shardkit.files import read_small
from shardkit.integrity import check_ranks
from shardkit.layout import Span
from shardkit.manifest import (
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
from shardkit.plan import Placement, Plan
from shardkit.publish import Stage, as_output_error, check_absent, check_space, publishing
from shardkit.recipe import Recipe
from shardkit.shards import ShardedCheckpoint
from shardkit.stream import FileSink, Job, Progress, copy
from shardkit.tensor import TensorSpec

Files = Mapping[str, tuple[bytes, Sequence[TensorSpec]]]


def no_progress(_: int) -> None:
    """For callers without a progress bar."""


def split(
    source: Checkpoint, plan: Plan, recipe: Recipe, out: Path, progress: Progress = no_progress
) -> Manifest:
    """Write one file per rank, the companion files, and the manifest last.

    Raises OutputError, SourceChanged or CheckpointError; then nothing is left behind.
    """
    check_absent(out)
    sample = source.sample()
    record = SourceRecord(
        source.name, source.revision, source.model_type, sample, source.files, source.index
    )
    draft = Manifest(
        make_split_id(plan, sample, recipe.sha256), plan, record, recipe.name, recipe.sha256,
        (), {}, __version__,
    )  # fmt: skip
    return _write_shards(source, draft, out, source.companions(), progress, source.check_unchanged)


def reshard(
    shards: ShardedCheckpoint, tp_size: int, out: Path, progress: Progress = no_progress
) -> Manifest:
    """Cut a shard folder for another number of ranks: byte for byte what a direct split writes.

    The shards are checked first.  Raises OutputError, LayoutError, or VerifyError for damage.
    """
    check_absent(out)
    check_ranks(shards, progress)
    old = shards.manifest
    plan = old.plan.over(tp_size)
    split_id = make_split_id(plan, old.source.sample, old.recipe_sha256)
    draft = replace(old, split_id=split_id, plan=plan, ranks=(), shardkit=__version__)
    return _write_shards(shards, draft, out, _copied(shards), progress, lambda: None)


def merge(shards: ShardedCheckpoint, out: Path, progress: Progress = no_progress) -> None:
    """Write the unsharded checkpoint again, in the source's own files, names and metadata.

    The shards are checked first.  Raises OutputError, or VerifyError for damage.
    """
    check_absent(out)
    check_ranks(shards, progress)
    manifest = shards.manifest
    specs = {spec.name: spec for spec in shards.specs()}
    files = {
        file.name: ([specs[name] for name in file.tensors], file.metadata)
        for file in manifest.source.files
    }
    headers: Files = {n: (header_bytes(held, meta), held) for n, (held, meta) in files.items()}
    owner = {s.name: i for i, (_, held) in enumerate(headers.values()) for s in held}
    placed = manifest.placements
    jobs = [
        Job(spec, placed[n].dim, ((owner[n], placed[n].spans(0, 1)),)) for n, spec in specs.items()
    ]
    check_space(out, _total(headers))
    with publishing(out, manifest.split_id) as stage:
        for name, data in _copied(shards):
            stage.write(name, data)
        _copy_into(stage, shards, jobs, headers, progress)
        if manifest.source.index:
            total = sum(spec.nbytes for spec in specs.values())
            stage.write(manifest.source.index.name, index_bytes(manifest.source.index, total))


def _write_shards(
    source: Source,
    draft: Manifest,
    out: Path,
    companions: Iterable[tuple[str, bytes]],
    progress: Progress,
    check_source: Callable[[], None],
) -> Manifest:
    """The common end of split and reshard; `draft` lacks what only the copy can tell."""
    plan = draft.plan
    files: dict[str, tuple[bytes, Sequence[TensorSpec]]] = {}
    for tp_rank in range(plan.tp_size):
        held = stored_specs(plan, tp_rank)
        metadata = shard_metadata(draft.split_id, tp_rank, plan.tp_size)
        files[rank_name(tp_rank, plan.tp_size)] = (header_bytes(held, metadata), held)
    jobs = [Job(p.spec, p.dim, takes(p, plan.tp_size)) for p in stored_order(plan.placements)]
    check_space(out, _total(files))
    with publishing(out, draft.split_id) as stage:
        copied = {}
        for name, data in companions:
            stage.write(name, data)
            copied[name] = Digest(len(data), sha256(data).hexdigest())
        sinks = _copy_into(stage, source, jobs, files, progress)
        check_source()
        ranks = tuple(_rank_file(n, s) for n, s in zip(files, sinks, strict=True))
        manifest = replace(draft, ranks=ranks, copied=copied)
        stage.write(NAME, manifest.data)
    return manifest


def takes(placement: Placement, tp_size: int) -> tuple[tuple[int, tuple[Span, ...]], ...]:
    """The spans each rank takes of a tensor, of the ranks that store it."""
    return tuple(
        (tp_rank, placement.spans(tp_rank, tp_size))
        for tp_rank in range(tp_size)
        if placement.shard(tp_rank, tp_size) is not None
    )


def _copy_into(
    stage: Stage, source: Source, jobs: Sequence[Job], files: Files, progress: Progress
) -> list[FileSink]:
    """Create the files, room reserved for all of them, then fill and sync them."""
    sizes = {name: _size(first, held) for name, (first, held) in files.items()}
    fds = [stage.create(name, size) for name, size in sizes.items()]
    with as_output_error(stage.folder):
        sinks = [FileSink(fd, files[name][0]) for fd, name in zip(fds, files, strict=True)]
        copy(source, jobs, sinks, progress)
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(stage.finish, files))
    return sinks


def _copied(shards: ShardedCheckpoint) -> Iterable[tuple[str, bytes]]:
    """The companion files of a shard folder, checked.  Raises ManifestError."""
    for name, digest in shards.manifest.copied.items():
        data = read_small(shards.folder / name, MAX_COMPANION, ManifestError)
        if Digest(len(data), sha256(data).hexdigest()) != digest:
            raise ManifestError(f"{shards.folder / name}: not the file that was copied")
        yield name, data


def _rank_file(name: str, sink: FileSink) -> RankFile:
    pieces = {tensor: Piece(at, end[:MARK]) for tensor, (at, end) in sink.marks.items()}
    return RankFile(name, Digest(sink.size, sink.sha256), pieces)


def _size(first: bytes, held: Sequence[TensorSpec]) -> int:
    return len(first) + sum(spec.nbytes for spec in held)


def _total(files: Files) -> int:
    return sum(_size(first, held) for first, held in files.values())
