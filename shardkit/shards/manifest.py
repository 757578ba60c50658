"""The manifest: a finished split in one JSON file, format 1.  README.md documents it.

It holds resolved layouts, not rules: merge, reshard, verify and the runtime need neither the recipe
nor the config again.  `split_id` is also in every shard's metadata, so a mixed, renamed or stale
shard fails even without the manifest.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardkit import strict_json
from shardkit.checkpoint.checkpoint import SourceFile
from shardkit.checkpoint.index import Index
from shardkit.layout.spans import Section
from shardkit.planning.plan import Placement, Plan
from shardkit.tensor import DTYPE_BITS, TensorSpec

FORMAT = 1
MANIFEST_NAME = "manifest.json"
PREFIX_DIGITS = 16  # hex digits of a mark


@dataclass(frozen=True, slots=True)
class Digest:
    """A file's size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor in a rank's file: the byte it starts at, and the digest of the file up to its end.

    The digest is a sha256's first 16 hex digits: it tells where damage begins, while the file's
    own sha256, which the last of them starts, is the authority.
    """

    offset: int
    prefix_sha256: str


@dataclass(frozen=True, slots=True)
class RankFile:
    """One rank's file: its digest, and the pieces in it by tensor name.

    `nonfinite` has how many values of a piece are NaN or infinite, of each piece that holds any.
    """

    name: str
    digest: Digest
    pieces: Mapping[str, Piece]
    nonfinite: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """Where the weights came from, and the file layout a merge gives back."""

    id: str
    revision: str
    model_type: str
    fingerprint: str
    files: tuple[SourceFile, ...]
    index: Index | None


@dataclass(frozen=True)
class Manifest:
    """A finished split; `companion_files` are the companion files."""

    split_id: str
    plan: Plan
    source: SourceRecord
    recipe: str
    recipe_sha256: str
    ranks: tuple[RankFile, ...]
    companion_files: Mapping[str, Digest]
    shardkit: str

    @property
    def tp_size(self) -> int:
        """The number of ranks."""
        return self.plan.tp_size

    @cached_property
    def placements(self) -> dict[str, Placement]:
        """Every tensor's placement, by name."""
        return {placement.spec.name: placement for placement in self.plan.placements}

    @property
    def nonfinite(self) -> dict[str, int]:
        """How many values are NaN or infinite, by tensor, each rank's own copy counted."""
        found: Counter[str] = Counter()
        for rank in self.ranks:
            found.update(rank.nonfinite)
        return dict(found)

    @cached_property
    def data(self) -> bytes:
        """The canonical bytes: what is on disk, with the digest of what they say without it."""
        own = hashlib.sha256(self.unsealed()).hexdigest()
        return strict_json.encode_canonical({**manifest_to_json(self), "sha256": own}) + b"\n"

    def unsealed(self) -> bytes:
        """The canonical bytes without their own digest, which is all that an older manifest has."""
        return strict_json.encode_canonical(manifest_to_json(self)) + b"\n"

    @property
    def sha256(self) -> str:
        """The digest that ranks compare before their first collective."""
        return hashlib.sha256(self.data).hexdigest()


def rank_file_name(tp_rank: int, tp_size: int) -> str:
    """A rank's file name."""
    return f"rank-{tp_rank:05d}-of-{tp_size:05d}.safetensors"


def make_shard_metadata(split_id: str, tp_rank: int, tp_size: int) -> dict[str, str]:
    """The safetensors metadata of a rank's file."""
    return {
        "format": "pt",
        "shardkit_format": str(FORMAT),
        "split_id": split_id,
        "tp_rank": str(tp_rank),
        "tp_size": str(tp_size),
    }


def sort_for_storage(placements: Sequence[Placement]) -> list[Placement]:
    """The order of tensors in a rank's file: wide dtypes first, so that every tensor is aligned.

    Within a width, the source's own order, so that a split reads the source front to back.
    """
    return sorted(placements, key=lambda p: -DTYPE_BITS[p.spec.dtype])


def list_stored_specs(plan: Plan, tp_rank: int) -> list[TensorSpec]:
    """What a rank's file holds, in order."""
    shards = (p.shard_spec(tp_rank, plan.tp_size) for p in sort_for_storage(plan.placements))
    return [shard for shard in shards if shard is not None]


def compute_signing_digest(manifest: Manifest, manifest_sha256: str) -> str:
    """The digest that OpenSSF model signing signs: of every file's raw sha256, by the file's name.

    https://github.com/sigstore/model-transparency calls it the subject.  `manifest_sha256` is of
    manifest.json as it is on disk.
    """
    digests = {MANIFEST_NAME: manifest_sha256}
    digests |= {rank.name: rank.digest.sha256 for rank in manifest.ranks}
    digests |= {name: digest.sha256 for name, digest in manifest.companion_files.items()}
    joined = b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))
    return hashlib.sha256(joined).hexdigest()


def make_split_id(plan: Plan, sample: str, recipe_sha256: str) -> str:
    """A name for a split that any other layout, size, recipe or source changes.

    Known before the first byte is copied, so it rests on a sample of the source; the digests in
    the manifest are the proof.
    """
    layout = {p.spec.name: placement_to_json(p) for p in plan.placements}
    value = [FORMAT, plan.tp_size, sample, recipe_sha256, layout]
    return hashlib.sha256(strict_json.encode_canonical(value)).hexdigest()


def manifest_to_json(manifest: Manifest) -> dict[str, object]:
    """The manifest as JSON values: tables, lists, strings and integers."""
    return {
        "format": FORMAT,
        "shardkit": manifest.shardkit,
        "split_id": manifest.split_id,
        "tp_size": manifest.tp_size,
        "recipe": {"name": manifest.recipe, "sha256": manifest.recipe_sha256},
        "source": _source_to_json(manifest.source),
        "units": {
            name: {"count": unit.count or 0, "sharers": unit.shared_by}
            for name, unit in manifest.plan.units.items()
        },
        "local": {
            "attributes": [
                {"module": a.module, "attribute": a.attribute, "times": a.unit, "per": a.per_unit}
                for a in manifest.plan.module_attributes
            ],
            "arguments": [
                {"module": a.module, "argument": a.argument, "dim": a.dim, "unit": a.unit,
                 "outer": a.outer}
                for a in manifest.plan.forward_arguments
            ],
        },
        "tensors": {
            name: placement_to_json(placement) for name, placement in manifest.placements.items()
        },
        "ranks": [_rank_to_json(rank) for rank in manifest.ranks],
        "copied": {
            name: {"size": d.size, "sha256": d.sha256} for name, d in manifest.companion_files.items()
        },
    }  # fmt: skip


def _rank_to_json(rank: RankFile) -> dict[str, object]:
    counted: dict[str, object] = {"nonfinite": rank.nonfinite} if rank.nonfinite else {}
    return counted | {
        "file": rank.name,
        "size": rank.digest.size,
        "sha256": rank.digest.sha256,
        "pieces": {name: [p.offset, p.prefix_sha256] for name, p in rank.pieces.items()},
    }


def placement_to_json(placement: Placement) -> dict[str, object]:
    """One tensor's layout as JSON values; `dim` -1 where it is not divided."""
    return {
        "dtype": placement.spec.dtype,
        "shape": list(placement.spec.shape),
        "style": placement.style,
        "dim": -1 if placement.dim is None else placement.dim,
        "sections": [_section_to_json(section) for section in placement.sections],
    }


def _section_to_json(section: Section) -> dict[str, object]:
    beside: dict[str, object] = {"beside": section.group_tail} if section.group_tail else {}
    return beside | {
        "repeat": section.repeat,
        "units": section.units,
        "size": section.size,
        "sharers": section.shared_by,
        "whole": section.replicated,
    }


def _source_to_json(source: SourceRecord) -> dict[str, object]:
    index = source.index
    return {
        "id": source.id,
        "revision": source.revision,
        "model_type": source.model_type,
        "sample": source.fingerprint,
        "files": [
            {"name": f.name, "size": f.size, "tensors": list(f.tensors),
             "metadata": [[key, value] for key, value in f.metadata.items()]}  # their order counts
            for f in source.files
        ],
        "index": {"name": index.name, "metadata": index.metadata} if index else None,
    }  # fmt: skip
