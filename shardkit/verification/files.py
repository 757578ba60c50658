"""Level 1: every file is there, whole, and the one that the split wrote.  No torch."""

import os
import stat
from collections.abc import Collection, Sequence
from hashlib import sha256
from pathlib import Path

from shardkit.checkpoint.checkpoint import MAX_COMPANION
from shardkit.errors import ManifestError
from shardkit.files import Progress, read_small_file
from shardkit.shards.integrity import find_rank_faults
from shardkit.shards.manifest import MANIFEST_NAME, Manifest
from shardkit.shards.manifest_json import read_manifest
from shardkit.shards.reader import open_shard
from shardkit.verification.report import Check
from shardkit.verification.scope import Scope

SIGNATURE = ".sig"
KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
}  # fmt: skip
EVERYTHING = Scope()


def check_files(folder: Path, progress: Progress, scope: Scope = EVERYTHING) -> Check:
    """Presence, sizes, headers, `split_id`, digests, and that the layout tiles every tensor.

    Raises LayoutError for a scope that the folder's ranks do not have.
    """
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return Check("files", "failed", "the manifest cannot be trusted", (str(error),))
    seen, read = scope.looked_at(manifest.tp_size), scope.read(manifest.tp_size)
    faults = [
        *_header_faults(folder, manifest, [rank for rank in seen if rank not in read]),
        *find_rank_faults(folder, manifest, map(manifest.mesh.rank, read), progress),
        *_companion_faults(folder, manifest),
        *_stray_faults(
            folder, {MANIFEST_NAME, *manifest.companion_files, *(r.name for r in manifest.ranks)}
        ),
    ]
    nbytes = sum(manifest.ranks[rank].digest.size for rank in read)
    numbers = {"bytes": nbytes, "tensors": len(manifest.placements), "read": read, "seen": seen}
    if faults:
        summary = f"{len(faults)} files are not what was written, or no part of it"
        return Check("files", "failed", summary, tuple(faults), numbers)
    return Check("files", "passed", _summary(manifest, seen, read), numbers=numbers)


def _summary(manifest: Manifest, seen: Sequence[int], read: Sequence[int]) -> str:
    """What was proven, and what was not looked at."""
    others = len(manifest.companion_files)
    everything = len(read) == manifest.tp_size
    shards = [f"{len(read)} shards" if everything else _ranks(read)] if read else []
    files = " and ".join([*shards, f"{others} other file{'s' * (others != 1)}"])
    parts = [
        f"{files} are, by sha256, what the split wrote",
        f"every one of {len(manifest.placements)} tensors is tiled",
    ]
    if headers := [rank for rank in seen if rank not in read]:
        parts.append(f"{_ranks(headers)}: size and header only, no data read")
    if left_out := [rank for rank in range(manifest.tp_size) if rank not in seen]:
        parts.append(f"{_ranks(left_out)}: not looked at")
    return "; ".join(parts)


def _ranks(ranks: Sequence[int]) -> str:
    return f"the {'shards' if len(ranks) > 1 else 'shard'} of rank {', '.join(map(str, ranks))}"


def _header_faults(folder: Path, manifest: Manifest, ranks: Sequence[int]) -> list[str]:
    faults = []
    for tp_rank in ranks:
        try:
            os.close(open_shard(folder, manifest, manifest.mesh.rank(tp_rank)))
        except ManifestError as error:
            faults.append(str(error))
    return faults


def _companion_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name, digest in manifest.companion_files.items():
        try:
            data = read_small_file(folder / name, MAX_COMPANION, ManifestError)
        except ManifestError as error:
            faults.append(str(error))
            continue
        if (len(data), sha256(data).hexdigest()) != (digest.size, digest.sha256):
            faults.append(f"{folder / name}: not the file that was copied")
    return faults


def _stray_faults(folder: Path, known: Collection[str]) -> list[str]:
    """What is in the folder besides the split: only signatures may be."""
    faults = []
    for path in sorted(folder.iterdir()):
        kind = stat.S_IFMT(path.lstat().st_mode)
        signature = path.suffix == SIGNATURE and kind == stat.S_IFREG
        if path.name not in known and not signature:
            what = KINDS.get(kind, "a device")
            faults.append(f"{path}: {what} that is no part of this split; remove it")
    return faults
