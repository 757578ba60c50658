"""A shard folder read as a checkpoint: the whole tensors again, from every rank's file."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint.header import read_open_header
from shardkit.errors import ManifestError
from shardkit.files import MAX_VIEWS, open_regular_file
from shardkit.layout import Tile, num_indices
from shardkit.output import RowPart
from shardkit.planning import Rank
from shardkit.shards.manifest import Manifest, RankFile
from shardkit.shards.manifest_json import read_manifest
from shardkit.strict_json import quote
from shardkit.tensor import TensorSpec, byte_view


@dataclass(frozen=True, slots=True)
class Run:
    """Neighboring bytes of a rank's file, and where they go.

    Attributes:
        index: The rank's number.
        start: The first byte's place in the file.
        views: What is to be filled, in order.
        nbytes: The bytes of all views.
    """

    index: int
    start: int
    views: tuple[memoryview, ...]
    nbytes: int


_Read = tuple[int, memoryview]  # where bytes start in a rank's file, and where they go


@dataclass(frozen=True, slots=True)
class StoredRows:
    """How a whole tensor lies in the files of all ranks.

    Seen around the divided dimension a tensor is `[outer, axis, inner]`: each outer index is a row
    of bytes, of which each tile of the axis is one stretch, stored by one rank.

    Attributes:
        outer: The number of rows.
        row: The bytes of one.
        tiles: The stretches of a row, in bytes: `[start, stop)`, the number of the rank that stores
            it, and where in that rank's own row.
        rank_rows: The bytes that each rank stores of a row.
        starts: Where the tensor starts in each rank's file.
    """

    outer: int
    row: int
    tiles: tuple[Tile, ...]
    rank_rows: tuple[int, ...]
    starts: tuple[int, ...]


class ShardedCheckpoint:
    """An open shard folder, every rank's file checked against the manifest but for its data.

    To be used in a `with`, or closed.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises ManifestError."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.fds: list[int] = []
        self._located = "", StoredRows(0, 0, (), (), ())  # the tensor that was asked for last
        try:
            for rank in self.manifest.mesh.ranks():
                self.fds.append(open_shard(folder, self.manifest, rank))
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
        """Fill `view` with the whole tensor's bytes from `offset` on. Raises ManifestError."""
        for run in self.plan_runs(name, offset, view):
            self.read_run(run)

    def plan_runs(self, name: str, offset: int, view: memoryview) -> Iterator[Run]:
        """What is to be read for `read_into`: each rank's runs, in the order of its file."""
        for index, reads in enumerate(self._plan_reads(name, offset, view)):
            yield from _join_reads(index, reads)

    def read_rows(
        self, name: str, offset: int, count: int, view: memoryview
    ) -> tuple[list[RowPart], list[Run]]:
        """Read whole rows: what each rank stores of them is one run of its file.

        Args:
            name: The tensor.
            offset: Where the rows start in it.
            count: The number of rows.
            view: Room for what all ranks store of these rows.

        Returns:
            Where the rows lie in `view`, part by part, and what was read.

        Raises:
            ManifestError: If a file cannot be read.
        """
        stored, at = self.find_rows(name), 0
        first = offset // stored.row
        held, runs = [], []
        for index, width in enumerate(stored.rank_rows):
            held.append(view[at : at + count * width])
            at += count * width
            if held[-1]:
                start = stored.starts[index] + first * width
                runs.append(Run(index, start, (held[-1],), count * width))
                self.read_run(runs[-1])
        parts = [
            RowPart(held[index], stored.rank_rows[index], local, local + stop - start)
            for start, stop, index, local in stored.tiles
        ]
        return parts, runs

    def _plan_reads(self, name: str, offset: int, view: memoryview) -> list[list[_Read]]:
        """For each rank, where in its file the wanted bytes lie, and where they go."""
        stored = self.find_rows(name)
        reads: list[list[_Read]] = [[] for _ in stored.starts]
        end, length = offset + len(view), max(stored.row, 1)
        for outer in range(offset // length, -(-end // length)):
            row = outer * stored.row
            for start, stop, index, local in stored.tiles:
                first, last = max(row + start, offset), min(row + stop, end)
                if first < last:
                    tile = stored.starts[index] + outer * stored.rank_rows[index] + local
                    target = view[first - offset : last - offset]
                    reads[index].append((tile + first - row - start, target))
        return reads

    def find_rows(self, name: str) -> StoredRows:
        """How a tensor lies in the files."""
        known, rows = self._located  # at once, as several threads may read
        if known != name:
            rows = self._find_rows(name)
            self._located = name, rows
        return rows

    def _find_rows(self, name: str) -> StoredRows:
        placement, mesh = self.manifest.placements[name], self.manifest.mesh
        tensor = byte_view(placement.spec, placement.dim)
        pieces = [rank_file.pieces.get(name) for rank_file in self.manifest.ranks]
        return StoredRows(
            tensor.outer,
            tensor.row,
            tuple(
                Tile(start * tensor.inner, stop * tensor.inner, index, local * tensor.inner)
                for start, stop, index, local in placement.tiles(mesh)
            ),
            tuple(num_indices(placement.spans(r)) * tensor.inner for r in mesh.ranks()),
            tuple(piece.offset if piece else 0 for piece in pieces),
        )

    def read_run(self, run: Run) -> None:
        """Fill a run's views by one system call. Raises ManifestError."""
        path = self.folder / self.manifest.ranks[run.index].name
        try:
            count = os.preadv(self.fds[run.index], run.views, run.start)
        except OSError as failure:
            raise ManifestError(f"{path}: cannot be read: {failure.strerror}") from None
        if count != run.nbytes:
            raise ManifestError(f"{path}: became shorter while it was read")


def _join_reads(index: int, reads: Sequence[_Read]) -> Iterator[Run]:
    """A rank's reads, neighbors joined, of as many views as one system call takes."""
    at = 0
    while at < len(reads):
        start, first = reads[at]
        views, stop = [first], start + len(first)
        for place, view in reads[at + 1 : at + MAX_VIEWS]:
            if place != stop:
                break
            views.append(view)
            stop += len(view)
        yield Run(index, start, tuple(views), stop - start)
        at += len(views)


def open_shard(folder: Path, manifest: Manifest, rank: Rank, header: bytes | None = None) -> int:
    """A descriptor of a rank's file, its size and header exactly the manifest's.

    `header` is what `Manifest.rank_header` makes, if the caller has it.
    Raises ManifestError naming the file: missing, cut short, of another split, or changed.
    """
    rank_file = manifest.ranks[rank.index]
    path = folder / rank_file.name
    if not path.exists():
        raise ManifestError(f"{path}: missing; the manifest lists it for rank {rank.index}")
    header = header or manifest.rank_header(rank)
    _check_header_size(path, manifest, rank, len(header))
    fd = open_regular_file(path, ManifestError)
    try:
        actual = os.pread(fd, len(header), 0)
        if actual != header:
            at, why = find_first_difference(actual, header), _explain(fd, path, manifest, rank)
            raise ManifestError(f"{why}; its header differs at byte {at}")
        _check_size(path, rank_file, os.fstat(fd).st_size)
    except OSError as failure:
        os.close(fd)
        raise ManifestError(f"{path}: cannot be read: {failure.strerror}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def find_first_difference(actual: bytes, expected: bytes) -> int:
    """Where `actual` stops being `expected`: its own length if it is only shorter."""
    pairs = zip(actual, expected, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(actual))


def _check_header_size(path: Path, manifest: Manifest, rank: Rank, size: int) -> None:
    """The pieces begin where the header ends, which reading the manifest leaves open."""
    rank_file = manifest.ranks[rank.index]
    stated = rank_file.digest.size
    # They cover the file from the first one on: that was checked when the manifest was read.
    data = stated - min((piece.offset for piece in rank_file.pieces.values()), default=stated)
    if size + data != stated:
        raise ManifestError(
            f"{path}: the manifest says {stated} bytes, but its layout makes {size + data}"
        )


def _check_size(path: Path, rank_file: RankFile, size: int) -> None:
    stated = rank_file.digest.size
    if size != stated:
        word = "truncated" if size < stated else "extended"
        raise ManifestError(f"{path}: {word}: {size} bytes, the manifest says {stated}")


def _explain(fd: int, path: Path, manifest: Manifest, rank: Rank) -> str:
    """What is wrong with a shard whose header is not the manifest's."""
    try:
        metadata = read_open_header(fd, path, ManifestError).metadata
    except ManifestError as fault:
        return str(fault)
    if metadata.get("split_id") != manifest.split_id:
        other = quote(metadata.get("split_id", "none"))
        return f"{path}: of another split: {other}, not {manifest.split_id}"
    if metadata.get("tp_rank") != str(rank.tp_rank):
        return f"{path}: is the file of rank {quote(metadata.get('tp_rank', 'none'))}, renamed"
    return f"{path}: its header is not the one this split wrote"
