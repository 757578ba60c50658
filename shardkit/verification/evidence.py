"""What a report is about: the split, its digests, what each rank holds, and what computed."""

import platform
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version

from shardkit import __version__
from shardkit.checkpoint import Checkpoint
from shardkit.planning import PlacementGroup, Plan, Rank
from shardkit.shards import Manifest, hash_manifest
from shardkit.verification.numerics_options import NumericsOptions

PACKAGES = ("torch", "transformers", "safetensors")


def describe_split(manifest: Manifest) -> dict[str, object]:
    """The split as JSON values: sizes, digests, source, and the layout by kind of tensor."""
    return {
        "split_id": manifest.split_id,
        "manifest_sha256": hash_manifest(manifest),
        "tp_size": manifest.tp_size,
        "ep_size": manifest.mesh.ep_size,
        "recipe": manifest.recipe,
        "recipe_sha256": manifest.recipe_sha256,
        "source": {
            "id": manifest.source.id,
            "revision": manifest.source.revision,
            "model_type": manifest.source.model_type,
            "fingerprint": manifest.source.fingerprint,
        },
        "ranks": [
            {"name": rank.name, "bytes": rank.digest.size, "sha256": rank.digest.sha256}
            for rank in manifest.ranks
        ],
        "layout": describe_layout(manifest.plan),
    }


def describe_layout(plan: Plan) -> list[dict[str, object]]:
    """Of each kind of tensor, how it is divided, and the bytes of it that each rank has.

    Tensors whose names differ in numbers alone are of one kind, in the order of the first.
    """
    ranks = list(plan.mesh.ranks())
    kinds: dict[tuple[str, str], list[PlacementGroup]] = {}
    for group in plan.groups:
        kinds.setdefault((group.tensors.pattern, group.layout.style.name), []).append(group)
    return [
        {
            "tensors": pattern,
            "style": style,
            "count": sum(group.count for group in groups),
            "bytes": sum(group.count * group.first.spec.nbytes for group in groups),
            "bytes_by_rank": [sum(_count_bytes(group, rank) for group in groups) for rank in ranks],
        }
        for (pattern, style), groups in kinds.items()
    ]


def _count_bytes(group: PlacementGroup, rank: Rank) -> int:
    part = group.first.shard_spec(rank)
    return group.count * part.nbytes if part else 0


def identify_check(
    manifest: Manifest, source: Checkpoint, dtype: str | None, options: NumericsOptions
) -> dict[str, str]:
    """What the numbers of a verification follow from, by name, besides the weights.

    Those of the shards are the manifest's and those of the source are the shards', if the levels
    files and weights have passed, which are run in any case.
    """
    companions = sha256()
    for name, data in source.companions():
        companions.update(f"{name} {sha256(data).hexdigest()}\n".encode())
    return {
        "manifest": hash_manifest(manifest),
        "source": companions.hexdigest(),
        "dtype": dtype or "",
        "sample": "" if options.sample is None else f"{options.sample} by seed {options.seed}",
        **list_versions(),
    }


def list_versions() -> dict[str, str]:
    """The versions of what computes, by name."""
    versions = {"shardkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
