"""Level 1: every file is there, whole, and the one that the split wrote.  No torch."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from shardkit.checkpoint.folder import MAX_COMPANION
from shardkit.errors import ManifestError, ShardkitError
from shardkit.files import read_small
from shardkit.integrity import rank_fault
from shardkit.manifest import NAME, Manifest
from shardkit.manifest_file import read_manifest
from shardkit.verify.report import Check

HARMLESS = (".sig", ".md")  # a signature, a model card
Progress = Callable[[int], object]


def check_files(folder: Path, progress: Progress) -> Check:
    """Presence, sizes, headers, `split_id`, digests, and that the layout tiles every tensor."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return Check("files", "failed", "the manifest cannot be trusted", (str(error),))
    faults = [*_shard_faults(folder, manifest, progress), *_other_faults(folder, manifest)]
    nbytes = sum(rank.digest.size for rank in manifest.ranks)
    if faults:
        return Check("files", "failed", f"{len(faults)} files are not what was written", (*faults,))
    return Check(
        "files", "passed",
        f"{len(manifest.ranks)} shards and {len(manifest.copied)} other files are what was written;"
        f" every one of {len(manifest.placements)} tensors is tiled",
        numbers={"bytes": nbytes, "tensors": len(manifest.placements)},
    )  # fmt: skip


def _shard_faults(folder: Path, manifest: Manifest, progress: Progress) -> list[str]:
    faults = []
    for tp_rank in range(manifest.tp_size):
        try:
            fault = rank_fault(folder, manifest, tp_rank, progress)
        except ShardkitError as error:
            fault = str(error)
        if fault is not None:
            faults.append(fault)
    return faults


def _other_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name, digest in manifest.copied.items():
        try:
            data = read_small(folder / name, MAX_COMPANION, ManifestError)
        except ManifestError as error:
            faults.append(str(error))
            continue
        if (len(data), sha256(data).hexdigest()) != (digest.size, digest.sha256):
            faults.append(f"{folder / name}: not the file that was copied")
    known = {NAME, *manifest.copied, *(rank.name for rank in manifest.ranks)}
    for path in sorted(folder.iterdir()):
        harmless = path.name.startswith(".") or path.suffix in HARMLESS
        if path.name not in known and not harmless:
            faults.append(f"{path}: not part of this split; remove it")
    return faults
