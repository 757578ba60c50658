"""Is a rank's file, byte for byte, the one that the split wrote? Digests only, no torch."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import accumulate, chain
from mmap import MAP_PRIVATE, mmap
from pathlib import Path

from shardkit.checkpoint import MAX_COMPANION
from shardkit.errors import ManifestError, ShardkitError, VerifyError
from shardkit.files import Progress, read_small_file, read_views
from shardkit.planning import Rank
from shardkit.shards.manifest import Digest, Manifest
from shardkit.shards.page_cache import count_cached_bytes
from shardkit.shards.rank_digest import RankDigest
from shardkit.shards.reader import ShardedCheckpoint, open_shard
from shardkit.tensor import TensorSpec

READ_BYTES = 4 << 20  # read at once
HASHED_BYTES = 512 << 10  # read, then hashed while they are still in a core's own cache
THREADS = 8


class RankReader:
    """A rank's open file, its pieces read one after another into the caller's memory.

    If they are hashed, what is hashed is what the caller has: no second open, and no memory map,
    whose bytes could change later or vanish. To be used in a `with`.

    Args:
        folder: The shard folder.
        manifest: Its manifest.
        rank: Whose file to open.
        check_sha256: Whether to hash what is read.
        threads: How many parts of what is not hashed are read at once.

    Raises:
        ManifestError: Unless the file's size and header are the split's.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        rank: Rank,
        check_sha256: bool = True,
        threads: int = 1,
    ) -> None:
        self.specs = manifest.stored_specs(rank)  # in the order of the file
        self._pieces = manifest.ranks[rank.index].pieces
        self._name = f"{folder / manifest.ranks[rank.index].name}: rank {rank.index}"
        # Made once: that of another rank, in another thread, takes its place in the manifest.
        header = manifest.rank_header(rank, self.specs)
        self._fd = open_shard(folder, manifest, rank, header)
        self._digest = RankDigest(folder, manifest, rank, header) if check_sha256 else None
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "shardkit") if threads > 1 else None

    def __enter__(self) -> "RankReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()
        os.close(self._fd)

    def offset(self, spec: TensorSpec) -> int:
        """Where a piece begins in the file."""
        return self._pieces[spec.name].offset

    def is_cached(self, spec: TensorSpec, nbytes: int) -> bool:
        """Whether most of so many bytes from a piece on are in memory; False if nobody knows."""
        return 2 * count_cached_bytes(self._fd, self.offset(spec), nbytes) > nbytes

    def map_memory(self) -> mmap:
        """The file as memory: what is written to it stays in this process. Raises ManifestError."""
        try:
            return mmap(self._fd, 0, MAP_PRIVATE)
        except OSError as failure:
            raise ManifestError(f"{self._name}: cannot be mapped: {failure.strerror}") from None

    def read(self, spec: TensorSpec, views: Iterable[memoryview]) -> None:
        """Fill the views with a piece, and with those that follow it, and check it.

        Pieces that are hashed are read in the file's order, none left out. The views may then be
        the same memory again and again.

        Raises:
            ManifestError: If the file cannot be read or became shorter.
            VerifyError: If the bytes are not the split's.
        """
        at = self.offset(spec)
        if not self._digest:
            self._read_parts(list(views), at)
            return
        for block in chain.from_iterable(map(split_blocks, views)):
            self._fill([block], at)
            at += len(block)
            self._digest.update(block)

    def _read_parts(self, views: list[memoryview], at: int) -> None:
        if self._pool is None or sum(map(len, views)) < self.threads * READ_BYTES:
            self._fill(views, at)
            return
        parts = split_evenly(views, self.threads)
        starts = accumulate((sum(map(len, part)) for part in parts), initial=at)
        list(self._pool.map(self._fill, parts, starts))  # raises what a read raised

    def _fill(self, views: list[memoryview], at: int) -> None:
        try:
            read_views(self._fd, views, at)
        except OSError as failure:
            raise ManifestError(f"{self._name}: cannot be read: {failure.strerror}") from None

    def finish(self) -> None:
        """Once every piece is read: raise VerifyError unless the file's sha256 is the split's."""
        if self._digest:
            self._digest.finish()


def split_blocks(view: memoryview) -> Iterator[memoryview]:
    """A view in parts of at most READ_BYTES."""
    for at in range(0, len(view), READ_BYTES):
        yield view[at : at + READ_BYTES]


def split_evenly(views: Sequence[memoryview], count: int) -> list[list[memoryview]]:
    """Views in so many parts of about as many bytes each, in order, a view cut where they meet.

    Example:
        >>> parts = split_evenly([memoryview(b"abc"), memoryview(b"defgh")], 2)
        >>> [[bytes(view) for view in part] for part in parts]
        [[b'abc', b'd'], [b'efgh']]
    """
    limit = max(1, -(-sum(map(len, views)) // count))
    parts: list[list[memoryview]] = [[]]
    room = limit
    for view in views:
        while view:
            if not room:
                parts.append([])
                room = limit
            parts[-1].append(view[:room])
            view, room = view[len(parts[-1][-1]) :], room - len(parts[-1][-1])
    return parts


def reuse_buffer(buffer: memoryview, nbytes: int, progress: Progress) -> Iterator[memoryview]:
    """One buffer again and again, `nbytes` in all, for bytes that are only hashed."""
    for at in range(0, nbytes, len(buffer)):
        view = buffer[: nbytes - at]
        yield view
        progress(len(view))


def read_companion(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A small file beside the shards. Raises ManifestError if it is not the one that was copied."""
    data = read_small_file(folder / name, MAX_COMPANION, ManifestError)
    if Digest(len(data), sha256(data).hexdigest()) != manifest.companion_files[name]:
        raise ManifestError(f"{folder / name}: not the file that was copied from the source")
    return data


def check_rank(folder: Path, manifest: Manifest, rank: Rank, progress: Progress) -> None:
    """Read a rank's file.

    Raises:
        VerifyError: Naming the tensor in which damage begins.
        ManifestError: If the file is missing, of another size, or its header is not the split's.
    """
    buffer = memoryview(bytearray(HASHED_BYTES))
    with RankReader(folder, manifest, rank) as reader:
        for spec in reader.specs:
            reader.read(spec, reuse_buffer(buffer, spec.nbytes, progress))
        reader.finish()


def check_ranks(shards: ShardedCheckpoint, progress: Progress) -> None:
    """Raise VerifyError naming every damaged file, and the tensor in which its damage begins."""
    ranks = shards.manifest.mesh.ranks()
    if faults := find_rank_faults(shards.folder, shards.manifest, ranks, progress):
        raise VerifyError("; ".join(faults))


def find_rank_faults(
    folder: Path, manifest: Manifest, ranks: Iterable[Rank], progress: Progress
) -> list[str]:
    """What is wrong with these ranks' files, one line for each that is not what was written."""

    def find_fault(rank: Rank) -> str:
        try:
            check_rank(folder, manifest, rank, progress)
        except ShardkitError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(filter(None, pool.map(find_fault, ranks)))
