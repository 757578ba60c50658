"""A shard folder read as a checkpoint: the whole tensors again, from every rank's file."""

import os
from collections.abc import Sequence
from pathlib import Path

from shardkit.checkpoint.header import read_open_header
from shardkit.errors import ManifestError
from shardkit.files import open_regular_file
from shardkit.layout.spans import Tile, num_indices
from shardkit.planning.plan import Placement
from shardkit.shards.manifest import Manifest, RankFile
from shardkit.shards.manifest_json import read_manifest, shard_header
from shardkit.strict_json import quote
from shardkit.tensor import TensorSpec, byte_view

IOV_MAX = 1024


class ShardedCheckpoint:
    """An open shard folder, every rank's file checked against the manifest but for its data."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.  Raises ManifestError."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.fds: list[int] = []
        self._tiles: dict[str, tuple[Tile, ...]] = {}
        try:
            for tp_rank in range(self.manifest.tp_size):
                self.fds.append(open_shard(folder, self.manifest, tp_rank))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ShardedCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        while self.fds:
            os.close(self.fds.pop())

    def specs(self) -> Sequence[TensorSpec]:
        """Every whole tensor, in the source's own order."""
        return [placement.spec for placement in self.manifest.plan.placements]

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the whole tensor's bytes from `offset` on.  Raises ManifestError."""
        placement = self.manifest.placements[name]
        for tp_rank, runs in enumerate(self._runs(placement, offset, view)):
            rank = self.manifest.ranks[tp_rank]
            if runs:
                self._read(tp_rank, rank.pieces[name].offset, runs)

    def _runs(
        self, placement: Placement, offset: int, view: memoryview
    ) -> list[list[tuple[int, memoryview]]]:
        """For each rank, where in its piece the wanted bytes start, and where they go."""
        size = self.manifest.tp_size
        tensor = byte_view(placement.spec, placement.dim)
        if placement.spec.name not in self._tiles:
            self._tiles[placement.spec.name] = placement.tiles(size)
        tiles = self._tiles[placement.spec.name]
        local = [count_rank_indices(placement, rank, size) * tensor.inner for rank in range(size)]
        runs: list[list[tuple[int, memoryview]]] = [[] for _ in range(size)]
        end = offset + len(view)
        for outer in range(offset // max(tensor.row, 1), -(-end // max(tensor.row, 1))):
            base = outer * tensor.row
            for start, stop, tp_rank, at in tiles:
                first = max(base + start * tensor.inner, offset)
                last = min(base + stop * tensor.inner, end)
                if first < last:
                    inside = first - base - start * tensor.inner
                    place = outer * local[tp_rank] + at * tensor.inner + inside
                    runs[tp_rank].append((place, view[first - offset : last - offset]))
        return runs

    def _read(self, tp_rank: int, base: int, runs: list[tuple[int, memoryview]]) -> None:
        """Read runs of a file, neighbours scattered by one system call."""
        at = 0
        while at < len(runs):
            start, views = runs[at][0], [runs[at][1]]
            stop = start + len(runs[at][1])
            while at + len(views) < len(runs) and len(views) < IOV_MAX:
                place, view = runs[at + len(views)]
                if place != stop:
                    break
                views.append(view)
                stop += len(view)
            path = self.folder / self.manifest.ranks[tp_rank].name
            try:
                count = os.preadv(self.fds[tp_rank], views, base + start)
            except OSError as failure:
                raise ManifestError(f"{path}: cannot be read: {failure.strerror}") from None
            if count != stop - start:
                raise ManifestError(f"{path}: became shorter while it was read")
            at += len(views)


def count_rank_indices(placement: Placement, tp_rank: int, tp_size: int) -> int:
    """How many indices of its sharded dimension a rank stores."""
    return num_indices(placement.spans(tp_rank, tp_size))


def open_shard(folder: Path, manifest: Manifest, tp_rank: int) -> int:
    """A descriptor of a rank's file, its size and header exactly the manifest's.

    Raises ManifestError naming the file: missing, cut short, of another split, or changed.
    """
    rank = manifest.ranks[tp_rank]
    path = folder / rank.name
    if not path.exists():
        raise ManifestError(f"{path}: missing; the manifest lists it for rank {tp_rank}")
    fd = open_regular_file(path, ManifestError)
    try:
        expected = shard_header(manifest, tp_rank)
        found = os.pread(fd, len(expected), 0)
        if found != expected:
            at, why = find_first_difference(found, expected), _foreign(fd, path, manifest, tp_rank)
            raise ManifestError(f"{why}; its header differs at byte {at}")
        _check_size(path, rank, os.fstat(fd).st_size)
    except OSError as failure:
        os.close(fd)
        raise ManifestError(f"{path}: cannot be read: {failure.strerror}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def find_first_difference(found: bytes, expected: bytes) -> int:
    """Where `found` stops being `expected`: its own length where it is only shorter."""
    pairs = zip(found, expected, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(found))


def _check_size(path: Path, rank: RankFile, size: int) -> None:
    if size != rank.digest.size:
        word = "truncated" if size < rank.digest.size else "extended"
        raise ManifestError(f"{path}: {word}: {size} bytes, the manifest says {rank.digest.size}")


def _foreign(fd: int, path: Path, manifest: Manifest, tp_rank: int) -> str:
    """What is wrong with a shard whose header is not the manifest's."""
    try:
        found = read_open_header(fd, path, ManifestError).metadata
    except ManifestError as fault:
        return str(fault)
    if found.get("split_id") != manifest.split_id:
        other = quote(found.get("split_id", "none"))
        return f"{path}: of another split: {other}, not {manifest.split_id}"
    if found.get("tp_rank") != str(tp_rank):
        return f"{path}: is the file of rank {quote(found.get('tp_rank', 'none'))}, renamed"
    return f"{path}: its header is not the one this split wrote"
