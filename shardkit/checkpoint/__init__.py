"""A source of tensors on disk: names, shapes, dtypes, byte ranges, and reads of those bytes."""

from shardkit.checkpoint.checkpoint import Checkpoint, SourceFile, open_checkpoint
from shardkit.checkpoint.source import Source

__all__ = ["Checkpoint", "Source", "SourceFile", "open_checkpoint"]
