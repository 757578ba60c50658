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
from shardkit.output import describe_nonfinite
from shardkit.planning import find_blocking_tensor, make_plan
from shardkit.recipe import find_recipe
from shardkit.shards import MANIFEST_NAME, Manifest, compute_signing_digest, read_manifest
from shardkit.shards.manifest_json import MAX_BYTES


@click.command()
@click.argument("path", type=FOLDER)
@JSON
def inspect(path: Path, as_json: bool) -> None:
    """Describe a shard folder or a checkpoint.

    PATH is a shard folder, whose manifest is read, or a checkpoint folder, whose headers are. No
    weights are read; use `shardkit verify` to check them.

    \b
    Example:
      shardkit inspect llama-tp4
      shardkit inspect models/llama --json
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / MANIFEST_NAME).exists():
        manifest = read_manifest(path)
        print_json(_shards_to_json(path, manifest)) if as_json else _print_shards(path, manifest)
        return
    with Checkpoint(path) as checkpoint:
        summary = _checkpoint_to_json(checkpoint)
    print_json(summary) if as_json else _print_checkpoint(summary)


def _shards_to_json(folder: Path, manifest: Manifest) -> dict[str, Any]:
    source = manifest.source
    return {
        "kind": "shards",
        "split_id": manifest.split_id,
        "signing_sha256": _signing_sha256(folder, manifest),
        "tp_size": manifest.tp_size,
        "expert_parallel": manifest.plan.is_expert_parallel,
        "shardkit": manifest.shardkit,
        "recipe": {"name": manifest.recipe, "sha256": manifest.recipe_sha256},
        "source": {
            "id": source.id,
            "revision": source.revision,
            "model_type": source.model_type,
            "files": len(source.files),
            "tensors": len(manifest.placements),
            "bytes": sum(p.spec.nbytes for p in manifest.plan.placements),
        },
        "nonfinite": manifest.nonfinite,
        "ranks": [
            {
                "tp_rank": tp_rank,
                "file": rank.name,
                "size": rank.digest.size,
                "sha256": rank.digest.sha256,
                "state": _check_size(folder / rank.name, rank.digest.size),
            }
            for tp_rank, rank in enumerate(manifest.ranks)
        ],
        "companion_files": sorted(manifest.companion_files),
    }


def _print_shards(folder: Path, manifest: Manifest) -> None:
    summary = _shards_to_json(folder, manifest)
    source, recipe = summary["source"], summary["recipe"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    ranks = format_count(manifest.tp_size, "rank")
    ranks += " with whole experts" if manifest.plan.is_expert_parallel else ""
    print_line(f"{folder}: shards for {ranks}, by shardkit {summary['shardkit']}")
    print_line(f"Split id  {summary['split_id']}")
    print_line(
        f"Source    {source['id']}{revision}: {source['model_type']},"
        f" {format_count(source['tensors'], 'tensor')}, {format_bytes(source['bytes'])}"
        f" in {format_count(source['files'], 'file')}"
    )
    print_line(f"Recipe    {recipe['name']}, sha256 {recipe['sha256']}")
    print_line(
        f"Signed as {summary['signing_sha256']} (the sha256 that OpenSSF model signing signs)"
    )
    if manifest.nonfinite:
        print_line(f"Values    {describe_nonfinite(manifest.nonfinite)}")
    print_line(f"Copied    {', '.join(summary['companion_files']) or 'nothing'}")
    for rank in summary["ranks"]:
        state = "" if rank["state"] == "present" else f"  {rank['state'].upper()}"
        print_line(f"  {rank['file']}  {rank['size']:>15,} bytes  sha256 {rank['sha256']}{state}")


def _signing_sha256(folder: Path, manifest: Manifest) -> str:
    """As the manifest has the files; `shardkit verify` is what shows that they are so."""
    data = read_small_file(folder / MANIFEST_NAME, MAX_BYTES, ManifestError)
    return compute_signing_digest(manifest, sha256(data).hexdigest())


def _check_size(path: Path, expected: int) -> str:
    if not path.is_file():
        return "missing"
    return "present" if path.stat().st_size == expected else "wrong size"


def _checkpoint_to_json(checkpoint: Checkpoint) -> dict[str, Any]:
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
        **_find_possible_sizes(checkpoint),
    }


def _find_possible_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The recipe for a checkpoint and the sizes it divides over, or why there is none."""
    name = None
    try:
        recipe = find_recipe(checkpoint.config)
        name = recipe.name
        checkpoint.check_config()
        plan = make_plan(checkpoint.specs(), recipe, checkpoint.config, 1)
    except (RecipeError, LayoutError) as error:
        return {"recipe": name, "possible_tp": None, "reason": str(error)}
    blocked = find_blocking_tensor(plan)
    possible = {"smallest": 1, "largest": plan.max_tp_size, "blocked_by": blocked}
    return {"recipe": name, "possible_tp": possible, "reason": None}


def _print_checkpoint(summary: dict[str, Any]) -> None:
    tensors = format_count(summary["tensors"], "tensor")
    files = format_count(summary["files"], "file")
    print_line(
        f"{summary['source']}: {summary['model_type']}, {tensors},"
        f" {format_bytes(summary['bytes'])} in {files}"
    )
    dtypes = ", ".join(
        f"{dtype} {format_bytes(n)}" for dtype, n in summary["bytes_by_dtype"].items()
    )
    print_line(f"Weights   {dtypes}")
    if summary["possible_tp"] is None:
        print_line(f"Recipe    {summary['recipe'] or 'none'}: {summary['reason']}")
        return
    possible = summary["possible_tp"]
    why = f"; {possible['blocked_by']} divides no further" if possible["blocked_by"] else ""
    print_line(f"Recipe    {summary['recipe']}")
    print_line(f"Possible  tp_size 1 to {possible['largest']}{why}")
