"""Level 1: every file is present, complete, and the one that the split wrote. No torch."""

import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from shardkit.errors import ManifestError
from shardkit.files import Progress
from shardkit.shards import (
    MANIFEST_NAME,
    Manifest,
    find_rank_faults,
    open_shard,
    read_companion,
    read_manifest,
)
from shardkit.verification.report import Check
from shardkit.verification.scope import EVERYTHING, Scope

SIGNATURE = ".sig"
FILE_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def check_files(
    folder: Path,
    progress: Progress,
    scope: Scope = EVERYTHING,
    manifest: Manifest | None = None,
    is_hashed: bool = False,
) -> Check:
    """Check presence, sizes, headers, `split_id`, digests, and that the layout covers every tensor.

    Args:
        folder: The shard folder.
        progress: Is called with the number of bytes read since the last call.
        scope: Which files to check.
        manifest: The folder's manifest, if it has been read.
        is_hashed: Whether the files in scope have been read already, and are what was written.

    Raises:
        LayoutError: The folder has no such rank or subset.
    """
    try:
        manifest = manifest or read_manifest(folder)
    except ManifestError as error:
        return Check("files", "failed", "the manifest cannot be trusted", (str(error),))
    checked, read = scope.ranks_checked(manifest.tp_size), scope.ranks_read(manifest.tp_size)
    unread = () if is_hashed else map(manifest.mesh.rank, read)
    faults = [
        *_find_header_faults(folder, manifest, [rank for rank in checked if rank not in read]),
        *find_rank_faults(folder, manifest, unread, progress),
        *_find_companion_faults(folder, manifest),
        *_find_stray_files(
            folder, {MANIFEST_NAME, *manifest.companion_files, *(r.name for r in manifest.ranks)}
        ),
    ]
    numbers = {
        "bytes": sum(manifest.ranks[rank].digest.size for rank in read),
        "tensors": len(manifest.placements),
        "ranks_read": read,
        "ranks_checked": checked,
    }
    if faults:
        summary = f"{len(faults)} files are not what the split wrote, or not part of it"
        return Check("files", "failed", summary, tuple(faults), numbers)
    return Check("files", "passed", _summarize(manifest, checked, read), numbers=numbers)


def _summarize(manifest: Manifest, checked: Sequence[int], read: Sequence[int]) -> str:
    """What was proven, and what was not checked."""
    others = len(manifest.companion_files)
    everything = len(read) == manifest.tp_size
    shards = [f"{len(read)} shards" if everything else _list_shards(read)] if read else []
    files = " and ".join([*shards, f"{others} other file{'s' * (others != 1)}"])
    parts = [
        f"{files} are, by sha256, what the split wrote",
        f"every one of {len(manifest.placements)} tensors is tiled",
    ]
    if headers := [rank for rank in checked if rank not in read]:
        parts.append(f"{_list_shards(headers)}: size and header only, no data read")
    if skipped := [rank for rank in range(manifest.tp_size) if rank not in checked]:
        parts.append(f"{_list_shards(skipped)}: not checked")
    return "; ".join(parts)


def _list_shards(ranks: Sequence[int]) -> str:
    return f"the {'shards' if len(ranks) > 1 else 'shard'} of rank {', '.join(map(str, ranks))}"


def _find_header_faults(folder: Path, manifest: Manifest, ranks: Sequence[int]) -> list[str]:
    faults = []
    for tp_rank in ranks:
        try:
            os.close(open_shard(folder, manifest, manifest.mesh.rank(tp_rank)))
        except ManifestError as error:
            faults.append(str(error))
    return faults


def _find_companion_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name in manifest.companion_files:
        try:
            read_companion(folder, manifest, name)
        except ManifestError as error:
            faults.append(str(error))
    return faults


def _find_stray_files(folder: Path, names: Collection[str]) -> list[str]:
    """What is in the folder besides the split: only signatures may be."""
    faults = []
    for path in sorted(folder.iterdir()):
        kind = stat.S_IFMT(path.lstat().st_mode)
        is_signature = path.suffix == SIGNATURE and kind == stat.S_IFREG
        if path.name not in names and not is_signature:
            what = FILE_KINDS.get(kind, "a device")
            faults.append(f"{path}: {what} that is not part of this split; remove it")
    return faults
