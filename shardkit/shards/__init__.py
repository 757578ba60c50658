"""The shard-folder format: its manifest, reading it as a checkpoint, and finding damage."""

from shardkit.shards.checked_reads import CheckedShards
from shardkit.shards.integrity import RankReader, check_ranks, find_rank_faults, read_companion
from shardkit.shards.manifest import (
    FORMAT,
    MANIFEST_NAME,
    PREFIX_DIGITS,
    Digest,
    Manifest,
    Piece,
    RankFile,
    SourceRecord,
    compute_signing_digest,
    make_shard_metadata,
    rank_file_name,
)
from shardkit.shards.manifest_json import (
    encode_manifest,
    hash_manifest,
    make_split_id,
    parse_manifest,
    read_manifest,
)
from shardkit.shards.rank_digest import RankDigest
from shardkit.shards.reader import ShardedCheckpoint, find_first_difference, open_shard

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "PREFIX_DIGITS",
    "CheckedShards",
    "Digest",
    "Manifest",
    "Piece",
    "RankDigest",
    "RankFile",
    "RankReader",
    "ShardedCheckpoint",
    "SourceRecord",
    "check_ranks",
    "compute_signing_digest",
    "encode_manifest",
    "find_first_difference",
    "find_rank_faults",
    "hash_manifest",
    "make_shard_metadata",
    "make_split_id",
    "open_shard",
    "parse_manifest",
    "rank_file_name",
    "read_companion",
    "read_manifest",
]
