"""The manifest: a finished split in one JSON file, format 1. The README beside this documents it.

It holds resolved layouts, not rules: merge, reshard, verify and the runtime need neither the recipe
nor the config again. `split_id` is also in every shard's metadata, so a mixed, renamed or stale
shard fails even without the manifest.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardkit.checkpoint import Index, SourceFile, encode_header
from shardkit.checkpoint.weight_files import MANIFEST_NAME as MANIFEST_NAME
from shardkit.dtypes import DTYPES
from shardkit.planning import Mesh, Placement, Plan, Rank
from shardkit.tensor import TensorSpec

FORMAT = 1
PREFIX_DIGITS = 16  # hex digits of a piece's prefix_sha256


@dataclass(frozen=True, slots=True)
class Digest:
    """A file's size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor in a rank's file.

    Attributes:
        offset: The byte it starts at.
        prefix_sha256: The first 16 hex digits of the sha256 of the file up to the piece's end. It
            tells where damage begins; the file's own sha256 is the authority.
    """

    offset: int
    prefix_sha256: str


@dataclass(frozen=True, slots=True)
class RankFile:
    """One rank's file: its digest, and the pieces in it by tensor name.

    `nonfinite` has how many values are NaN or infinite, of each piece that holds any.
    """

    name: str
    digest: Digest
    pieces: Mapping[str, Piece]
    nonfinite: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """Where the weights came from, and the file layout that a merge gives back.

    `fingerprint` is a digest of every header and of each tensor's first and last bytes.
    """

    id: str
    revision: str
    model_type: str
    fingerprint: str
    files: tuple[SourceFile, ...]
    index: Index | None


@dataclass(frozen=True)
class Manifest:
    """A finished split. `companion_files` are the small files copied beside the shards."""

    split_id: str
    plan: Plan
    source: SourceRecord
    recipe: str
    recipe_sha256: str
    ranks: tuple[RankFile, ...]
    companion_files: Mapping[str, Digest]
    shardkit: str

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return self.plan.mesh

    @property
    def tp_size(self) -> int:
        """The number of tensor-parallel ranks."""
        return self.plan.tp_size

    @cached_property
    def placements(self) -> dict[str, Placement]:
        """Every tensor's placement, by name."""
        return {placement.spec.name: placement for placement in self.plan.placements}

    @cached_property
    def weights(self) -> dict[str, Placement]:
        """As `placements`, but each quantized weight as one, as it would be in 16 bits."""
        return {placement.spec.name: placement for placement in self.plan.weights}

    @cached_property
    def storage_order(self) -> Sequence[Placement]:
        """The placements in the order of a rank's file: wide dtypes first, so that all are aligned.

        Within a width, the source's own order, so that a split reads the source front to back.
        """
        return sorted(self.plan.placements, key=lambda p: -DTYPES[p.spec.dtype].bits)

    def stored_specs(self, rank: Rank) -> list[TensorSpec]:
        """What a rank's file holds, in order."""
        shards = (placement.shard_spec(rank) for placement in self.storage_order)
        return [shard for shard in shards if shard is not None]

    def rank_header(self, rank: Rank, specs: Sequence[TensorSpec] | None = None) -> bytes:
        """The exact first bytes of a rank's file, which follow from the layout. The last is kept.

        One of 200,000 tensors takes a second to make, and 30 MB. `specs` is what `stored_specs`
        lists, if the caller has it.
        """
        index, header = self._last_header[0]
        if index != rank.index:
            header = encode_header(
                specs or self.stored_specs(rank), make_shard_metadata(self.split_id, rank)
            )
            self._last_header[0] = rank.index, header
        return header

    @cached_property
    def _last_header(self) -> list[tuple[int, bytes]]:
        return [(-1, b"")]

    @property
    def nonfinite(self) -> dict[str, int]:
        """How many values are NaN or infinite, by tensor, each rank's own copy counted."""
        counts: Counter[str] = Counter()
        for rank_file in self.ranks:
            counts.update(rank_file.nonfinite)
        return dict(counts)


def rank_file_name(rank: Rank) -> str:
    """A rank's file name: `rank-00000-of-00004.safetensors`."""
    return f"rank-{rank.index:05d}-of-{rank.mesh.world_size:05d}.safetensors"


def make_shard_metadata(split_id: str, rank: Rank) -> dict[str, str]:
    """The safetensors metadata of a rank's file."""
    return {
        "format": "pt",
        "shardkit_format": str(FORMAT),
        "split_id": split_id,
        "tp_rank": str(rank.tp_rank),
        "tp_size": str(rank.mesh.tp_size),
    }


def compute_signing_digest(manifest: Manifest, manifest_sha256: str) -> str:
    """The digest that OpenSSF model signing signs: of every file's raw sha256, by the file's name.

    https://github.com/sigstore/model-transparency calls it the subject. `manifest_sha256` is of
    manifest.json as it is on disk.
    """
    digests = {MANIFEST_NAME: manifest_sha256}
    digests |= {rank_file.name: rank_file.digest.sha256 for rank_file in manifest.ranks}
    digests |= {name: digest.sha256 for name, digest in manifest.companion_files.items()}
    raw = b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))
    return hashlib.sha256(raw).hexdigest()
