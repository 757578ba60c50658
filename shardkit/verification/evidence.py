"""What a report is about: the split, its digests, what each rank holds, and what computed."""

import platform
import re
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version

from shardkit import __version__
from shardkit.planning import Plan
from shardkit.shards import Manifest, hash_manifest

PACKAGES = ("torch", "transformers", "safetensors")
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


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
    kinds: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * len(ranks))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    whole: dict[tuple[str, str], int] = defaultdict(int)
    for placement in plan.placements:
        kind = NUMBERS.sub("*", placement.spec.name), placement.style.name
        counts[kind] += 1
        whole[kind] += placement.spec.nbytes
        for at, rank in enumerate(ranks):
            part = placement.shard_spec(rank)
            kinds[kind][at] += part.nbytes if part else 0
    return [
        {
            "tensors": kind[0],
            "style": kind[1],
            "count": counts[kind],
            "bytes": whole[kind],
            "bytes_by_rank": nbytes,
        }
        for kind, nbytes in kinds.items()
    ]


def list_versions() -> dict[str, str]:
    """The versions of what computes, by name."""
    found = {"shardkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
