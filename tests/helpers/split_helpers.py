"""Splits of small sources, and what each rank's file should hold, worked out another way."""

from pathlib import Path

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.header import read_header
from shardkit.convert import (
    merge_destination,
    merge_shards,
    reshard_shards,
    shard_destination,
    split_checkpoint,
)
from shardkit.dtypes import DTYPES
from shardkit.files import Progress, ignore_progress
from shardkit.planning import Mesh, Placement, make_plan
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.recipe import Recipe
from shardkit.shards.manifest import Manifest, rank_file_name
from shardkit.shards.reader import ShardedCheckpoint
from tests.helpers.synthetic_checkpoints import tensor_bytes


def split_folder(
    source: Path,
    out: Path,
    tp_size: int,
    recipe: Recipe | None = None,
    progress: Progress = ignore_progress,
    **options: bool,
) -> Manifest:
    """Split with the recipe of the source's model type, or another."""
    with Checkpoint(source) as checkpoint:
        recipe = recipe or find_recipe(checkpoint.config)
        plan = make_plan(checkpoint.specs(), recipe, checkpoint.config, tp_size)
        finite = options.pop("fail_on_nonfinite", False)
        destination = shard_destination(out, **options)
        return split_checkpoint(checkpoint, plan, recipe, destination, progress, finite)


def merge_folder(
    shards: Path, out: Path, progress: Progress = ignore_progress, **options: bool
) -> None:
    """Merge a shard folder."""
    with ShardedCheckpoint(shards) as opened:
        merge_shards(opened, merge_destination(opened.manifest, out, **options), progress)


def reshard_folder(
    shards: Path, out: Path, tp_size: int, progress: Progress = ignore_progress, **options: bool
) -> Manifest:
    """Reshard a shard folder."""
    with ShardedCheckpoint(shards) as opened:
        return reshard_shards(opened, tp_size, shard_destination(out, **options), progress)


def shard_bytes(folder: Path, manifest: Manifest, tp_rank: int) -> dict[str, bytes]:
    """The bytes of each tensor in a rank's file, found by the file's own header."""
    path = folder / manifest.ranks[tp_rank].name
    data = path.read_bytes()
    return {e.spec.name: data[e.start : e.stop] for e in read_header(path).entries}


def cut_bytes(placement: Placement, tp_rank: int, tp_size: int) -> bytes:
    """A rank's part of a tensor, taken from its bytes index by index."""
    data = tensor_bytes(placement.spec)
    spans = placement.spans(Mesh(tp_size).rank(tp_rank))
    if placement.dim is None or not data:
        return data
    shape, dim = placement.spec.shape, placement.dim
    inner = DTYPES[placement.spec.dtype].bits // 8
    for size in shape[dim + 1 :]:
        inner *= size
    row = shape[dim] * inner
    return b"".join(
        data[start + index * inner : start + (index + 1) * inner]
        for start in range(0, len(data), row)
        for span in spans
        for index in range(span.start, span.stop)
    )


def assert_shards_hold_their_spans(folder: Path, manifest: Manifest) -> None:
    """Every rank's file holds its own part of every tensor, and nothing else."""
    for tp_rank in range(manifest.tp_size):
        expected = {
            name: cut_bytes(placement, tp_rank, manifest.tp_size)
            for name, placement in manifest.placements.items()
            if tp_rank == 0 or placement.style.name != "ignore"
        }
        assert shard_bytes(folder, manifest, tp_rank) == expected


def shard_name(tp_rank: int, tp_size: int) -> str:
    """The name of a rank's file."""
    return rank_file_name(Mesh(tp_size).rank(tp_rank))
