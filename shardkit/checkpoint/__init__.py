"""A source of tensors on disk: names, shapes, dtypes, byte ranges, and reads of those bytes."""

from shardkit.checkpoint.checkpoint import MAX_COMPANION, Checkpoint, SourceFile, open_checkpoint
from shardkit.checkpoint.config import MAX_CONFIG, parse_config, read_config
from shardkit.checkpoint.config_check import check_config
from shardkit.checkpoint.header import encode_header
from shardkit.checkpoint.index import Index, encode_index
from shardkit.checkpoint.pickled import open_source
from shardkit.checkpoint.source import Source
from shardkit.checkpoint.wrapper_names import (
    describe_wrapper_mark,
    find_wrapper_prefix,
    is_wrapper_prefix,
)

__all__ = [
    "MAX_COMPANION",
    "MAX_CONFIG",
    "Checkpoint",
    "Index",
    "Source",
    "SourceFile",
    "check_config",
    "describe_wrapper_mark",
    "encode_header",
    "encode_index",
    "find_wrapper_prefix",
    "is_wrapper_prefix",
    "open_checkpoint",
    "open_source",
    "parse_config",
    "read_config",
]
