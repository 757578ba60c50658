"""Is a rank's file, byte for byte, the one that the split wrote?  Digests only, no torch."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from shardkit.errors import VerifyError
from shardkit.manifest import MARK, Manifest, stored_specs
from shardkit.shards import ShardedCheckpoint, open_shard

BLOCK = 4 << 20


def check_ranks(shards: ShardedCheckpoint, progress: Callable[[int], object]) -> None:
    """Raise VerifyError naming every damaged file, and the tensor the damage begins in."""
    ranks = range(shards.manifest.tp_size)
    faults = rank_faults(shards.folder, shards.manifest, ranks, progress)
    if faults:
        raise VerifyError("; ".join(faults))


def rank_faults(
    folder: Path, manifest: Manifest, ranks: Iterable[int], progress: Callable[[int], object]
) -> list[str]:
    """What is wrong with the bytes of these ranks' files, one line for each damaged file."""

    def fault(tp_rank: int) -> str | None:
        return rank_fault(folder, manifest, tp_rank, progress)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [found for found in pool.map(fault, ranks) if found is not None]


def rank_fault(
    folder: Path, manifest: Manifest, tp_rank: int, progress: Callable[[int], object]
) -> str | None:
    """Where a rank's file first differs from what was written; None where it does not.

    Raises ManifestError if the file is missing, of another size, or its header is not the split's.
    """
    rank = manifest.ranks[tp_rank]
    path = folder / rank.name
    fd = open_shard(folder, manifest, tp_rank)
    try:
        names = [spec.name for spec in stored_specs(manifest.plan, tp_rank)]
        bounds = [*(rank.pieces[name].offset for name in names), rank.digest.size]
        digest = hashlib.sha256(os.pread(fd, bounds[0], 0))
        buffer = memoryview(bytearray(BLOCK))
        for name, (start, stop) in zip(names, pairwise(bounds), strict=True):
            _hash_range(fd, start, stop, digest.update, buffer, progress)
            if digest.hexdigest()[:MARK] != rank.pieces[name].mark:
                return (
                    f"{path}: rank {tp_rank}: {name}: damaged between byte {start} and {stop};"
                    " split again, or restore the file"
                )
    finally:
        os.close(fd)
    if digest.hexdigest() != rank.digest.sha256:
        return f"{path}: rank {tp_rank}: sha256 {digest.hexdigest()} is not the manifest's"
    return None


def _hash_range(
    fd: int,
    start: int,
    stop: int,
    update: Callable[[memoryview], None],
    buffer: memoryview,
    progress: Callable[[int], object],
) -> None:
    while start < stop:
        count = os.preadv(fd, [buffer[: stop - start]], start)
        if count == 0:
            raise VerifyError(f"a shard became shorter than byte {stop} while it was read")
        update(buffer[:count])
        progress(count)
        start += count
