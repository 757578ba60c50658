"""A shard folder read as a checkpoint, every byte of its files hashed in the pass that copies them.

What a copy reads is hashed where it lies in memory. A sha256 takes a file in order, so what no copy
reads, as a replicated tensor's other copies, or reads only later, is read for the digest alone.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

from shardkit.errors import ManifestError, ShardkitError, VerifyError
from shardkit.files import Progress, ignore_progress, read_exactly
from shardkit.output import RowPart
from shardkit.planning import Rank
from shardkit.shards.integrity import THREADS, check_ranks
from shardkit.shards.rank_digest import RankDigest
from shardkit.shards.reader import Run, ShardedCheckpoint

SKIP_BYTES = 256 << 10  # read at once for the digest alone


class CheckedShards:
    """The blocks of a copy, and the hashing of the files that they are read from.

    Args:
        shards: An open shard folder.
        progress: Called with the bytes hashed.
    """

    def __init__(self, shards: ShardedCheckpoint, progress: Progress) -> None:
        self._shards = shards
        self._rooms: dict[int, bytearray] = {}  # for what is read of many ranks
        ranks = shards.manifest.mesh.ranks()
        self._files = [_HashedFile(shards, rank, progress) for rank in ranks]

    def read_block(
        self, name: str, offset: int, view: memoryview
    ) -> Iterable[tuple[int, Callable[[], None]]]:
        """Fill `view` with a tensor's bytes from `offset` on.

        Returns:
            By number of the rank, what is to be called before `view` is filled anew, in the order
            in which blocks were read: it hashes what was read of that rank's file.

        Raises:
            ManifestError: If a file cannot be read.
        """
        runs = list(self._shards.plan_runs(name, offset, view))
        for run in runs:
            self._shards.read_run(run)
        return self._hash_later(runs)

    def read_rows(
        self, name: str, offset: int, view: memoryview, width: int
    ) -> tuple[Sequence[RowPart], Iterable[tuple[int, Callable[[], None]]]]:
        """As `read_block`, of whole rows, of `width` bytes each, which stay as ranks store them.

        Returns:
            Where the rows lie now, part by part; and what `read_block` returns.

        Raises:
            ManifestError: If a file cannot be read.
        """
        count = len(view) // width
        room = self._find_room(view, count * sum(self._shards.find_rows(name).rank_rows))
        parts, runs = self._shards.read_rows(name, offset, count, room)
        return parts, self._hash_later(runs)

    def _hash_later(self, runs: Iterable[Run]) -> list[tuple[int, Callable[[], None]]]:
        by_rank = groupby(runs, lambda run: run.index)
        return [(index, partial(self._files[index].hash_runs, list(own))) for index, own in by_rank]

    def _find_room(self, view: memoryview, size: int) -> memoryview:
        """The view, or, if several ranks have the same, a buffer that is free whenever it is."""
        if size <= len(view):
            return view[:size]
        key = id(view.obj)
        if len(self._rooms.get(key, b"")) < size:
            self._rooms[key] = bytearray(size)
        return memoryview(self._rooms[key])[:size]

    def finish(self) -> None:
        """Hash what is left of every file.

        Raises:
            VerifyError: Naming every file that is not what was written.
            ManifestError: If a file was written to while it was read.
        """
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(_HashedFile.finish, self._files))

    def explain(self, fault: VerifyError) -> ShardkitError:
        """The error that names every damaged file, where `fault` is the first that was met."""
        try:
            check_ranks(self._shards, ignore_progress)
        except ShardkitError as every:
            return every
        return fault


class _HashedFile:
    """One rank's file, hashed from its start to its end."""

    def __init__(self, shards: ShardedCheckpoint, rank: Rank, progress: Progress) -> None:
        manifest = shards.manifest
        self._digest = RankDigest(shards.folder, manifest, rank)
        self._path = shards.folder / manifest.ranks[rank.index].name
        self._fd = shards.fds[rank.index]
        self._progress = progress
        self._state = _describe_state(self._fd)

    def hash_runs(self, runs: Iterable[Run]) -> None:
        """Hash what was read, and what lies before it. Raises VerifyError or ManifestError."""
        for run in runs:
            self._hash_up_to(run.start)
            behind = self._digest.offset - run.start
            if behind < run.nbytes:
                data = run.views[0] if len(run.views) == 1 else memoryview(b"".join(run.views))
                self._hash(data[behind:])

    def finish(self) -> None:
        self._hash_up_to(self._digest.size)
        self._digest.finish()
        # What was read a second time, after it was hashed, is only then what was hashed.
        if _describe_state(self._fd) != self._state:
            raise ManifestError(f"{self._path}: was written to while it was read")

    def _hash_up_to(self, offset: int) -> None:
        buffer = memoryview(bytearray(min(SKIP_BYTES, max(0, offset - self._digest.offset))))
        while (left := offset - self._digest.offset) > 0:
            view = buffer[:left]
            try:
                read_exactly(self._fd, view, self._digest.offset)
            except OSError as failure:
                raise ManifestError(f"{self._path}: cannot be read: {failure.strerror}") from None
            self._hash(view)

    def _hash(self, view: memoryview) -> None:
        self._digest.update(view)
        self._progress(len(view))


def _describe_state(fd: int) -> tuple[int, int]:
    """What changes if a file is written to."""
    state = os.fstat(fd)
    return state.st_size, state.st_mtime_ns
