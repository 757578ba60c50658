"""Writes shards from a checkpoint, other shards from shards, and the checkpoint again."""

from shardkit.convert.checkpoint_writer import MergeResult, merge, merge_shards
from shardkit.convert.replaceable import merge_destination, shard_destination
from shardkit.convert.shard_writer import (
    SplitResult,
    reshard,
    reshard_shards,
    split,
    split_checkpoint,
)

__all__ = [
    "MergeResult",
    "SplitResult",
    "merge",
    "merge_destination",
    "merge_shards",
    "reshard",
    "reshard_shards",
    "shard_destination",
    "split",
    "split_checkpoint",
]
