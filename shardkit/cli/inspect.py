"""`shardkit inspect`: what a folder holds."""

from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from shardkit.checkpoint import Checkpoint
from shardkit.cli.options import FOLDER, JSON
from shardkit.cli.output import format_bytes, format_count, print_json, print_line
from shardkit.errors import CheckpointError, LayoutError, ManifestError, RecipeError
from shardkit.files import read_small_file
from shardkit.output.nonfinite import describe_nonfinite
from shardkit.planning.plan import make_plan
from shardkit.planning.summary import count_total_bytes, find_blocking_tensor
from shardkit.recipe.catalog import find_recipe
from shardkit.shards.manifest import MANIFEST_NAME, Manifest, compute_signing_digest
from shardkit.shards.manifest_json import MAX_BYTES, read_manifest


@click.command()
@click.argument("path", type=FOLDER)
@JSON
def inspect(path: Path, as_json: bool) -> None:
    """Say what a folder holds.

    PATH is a shard folder, of which the manifest is read, or a checkpoint folder, of which the
    headers are.  No weights are read: `shardkit verify` is what checks them.

    \b
    Example:
      shardkit inspect llama-tp4
      shardkit inspect models/llama --json
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / MANIFEST_NAME).exists():
        manifest = read_manifest(path)
        print_json(_shards_json(path, manifest)) if as_json else _say_shards(path, manifest)
        return
    with Checkpoint(path) as checkpoint:
        found = _checkpoint_json(checkpoint)
    print_json(found) if as_json else _say_checkpoint(found)


def _shards_json(folder: Path, manifest: Manifest) -> dict[str, Any]:
    source = manifest.source
    return {
        "kind": "shards",
        "split_id": manifest.split_id,
        "signing_sha256": _signing_sha256(folder, manifest),
        "tp_size": manifest.tp_size,
        "shardkit": manifest.shardkit,
        "recipe": {"name": manifest.recipe, "sha256": manifest.recipe_sha256},
        "source": {
            "id": source.id,
            "revision": source.revision,
            "model_type": source.model_type,
            "files": len(source.files),
            "tensors": len(manifest.placements),
            "bytes": count_total_bytes(manifest.plan),
        },
        "nonfinite": manifest.nonfinite,
        "ranks": [
            {
                "tp_rank": tp_rank,
                "file": rank.name,
                "size": rank.digest.size,
                "sha256": rank.digest.sha256,
                "state": _state(folder / rank.name, rank.digest.size),
            }
            for tp_rank, rank in enumerate(manifest.ranks)
        ],
        "copied": sorted(manifest.companion_files),
    }


def _say_shards(folder: Path, manifest: Manifest) -> None:
    found = _shards_json(folder, manifest)
    source, recipe = found["source"], found["recipe"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    print_line(
        f"{folder}: shards for {format_count(manifest.tp_size, 'rank')}, by shardkit {found['shardkit']}"
    )
    print_line(f"Split id  {found['split_id']}")
    print_line(
        f"Source    {source['id']}{revision}: {source['model_type']},"
        f" {format_count(source['tensors'], 'tensor')}, {format_bytes(source['bytes'])}"
        f" in {format_count(source['files'], 'file')}"
    )
    print_line(f"Recipe    {recipe['name']}, sha256 {recipe['sha256']}")
    print_line(f"Signed as {found['signing_sha256']} (the sha256 that OpenSSF model signing signs)")
    if manifest.nonfinite:
        print_line(f"Values    {describe_nonfinite(manifest.nonfinite)}")
    print_line(f"Copied    {', '.join(found['copied']) or 'nothing'}")
    for rank in found["ranks"]:
        state = "" if rank["state"] == "present" else f"  {rank['state'].upper()}"
        print_line(f"  {rank['file']}  {rank['size']:>15,} bytes  sha256 {rank['sha256']}{state}")


def _signing_sha256(folder: Path, manifest: Manifest) -> str:
    """As the manifest has the files; `shardkit verify` is what shows that they are so."""
    data = read_small_file(folder / MANIFEST_NAME, MAX_BYTES, ManifestError)
    return compute_signing_digest(manifest, sha256(data).hexdigest())


def _state(path: Path, expected: int) -> str:
    if not path.is_file():
        return "missing"
    return "present" if path.stat().st_size == expected else "wrong size"


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for spec in checkpoint.specs():
        dtypes[spec.dtype] += spec.nbytes
    return {
        "kind": "checkpoint",
        "source": checkpoint.name,
        "model_type": checkpoint.model_type,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.specs()),
        "bytes": sum(dtypes.values()),
        "bytes_by_dtype": dict(dtypes.most_common()),
        **_serving(checkpoint),
    }


def _serving(checkpoint: Checkpoint) -> dict[str, Any]:
    """The recipe that serves a checkpoint and the sizes it divides over, or why none does."""
    name = None
    try:
        recipe = find_recipe(checkpoint.config)
        name = recipe.name
        plan = make_plan(checkpoint.specs(), recipe, checkpoint.config, 1)
    except (RecipeError, LayoutError) as error:
        return {"recipe": name, "possible_tp": None, "reason": str(error)}
    blocked = find_blocking_tensor(plan)
    possible = {"smallest": 1, "largest": plan.max_tp_size, "blocked_by": blocked}
    return {"recipe": name, "possible_tp": possible, "reason": None}


def _say_checkpoint(found: dict[str, Any]) -> None:
    print_line(
        f"{found['source']}: {found['model_type']}, {format_count(found['tensors'], 'tensor')},"
        f" {format_bytes(found['bytes'])} in {format_count(found['files'], 'file')}"
    )
    dtypes = ", ".join(f"{dtype} {format_bytes(n)}" for dtype, n in found["bytes_by_dtype"].items())
    print_line(f"Weights   {dtypes}")
    if found["possible_tp"] is None:
        print_line(f"Recipe    {found['recipe'] or 'none'}: {found['reason']}")
        return
    possible = found["possible_tp"]
    why = f"; {possible['blocked_by']} divides no further" if possible["blocked_by"] else ""
    print_line(f"Recipe    {found['recipe']}")
    print_line(f"Possible  tp_size 1 to {possible['largest']}{why}")
