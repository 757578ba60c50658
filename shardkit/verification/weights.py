"""Level 2: every byte of every rank's tensors is the source's, in the place the layout says.

The stream that writes shards runs over the source again, into writers that compare, and that hash
what they compare if the level files is run in the same pass.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import local

from shardkit.checkpoint import Checkpoint
from shardkit.errors import ManifestError, ShardkitError
from shardkit.files import Progress, read_exactly
from shardkit.output import PlainReader, TensorCopy, copy_tensors
from shardkit.shards import (
    Manifest,
    RankDigest,
    find_first_difference,
    open_shard,
    read_manifest,
)
from shardkit.tensor import TensorSpec
from shardkit.verification.report import Check
from shardkit.verification.scope import EVERYTHING, Scope

MAX_LISTED = 8
COMPARED_BYTES = 512 << 10  # read, then hashed and compared while they are in a core's own cache

# Python compares memoryviews value by value; memcmp(3), called so, lets other threads run, too.
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


class ReadBuffer(local):
    """Memory of each thread's own to read into."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(COMPARED_BYTES))


class RankFileComparer:
    """Compares a rank's file with the bytes it should hold; a TensorWriter that writes nothing.

    Args:
        folder: The shard folder.
        manifest: Its manifest.
        tp_rank: Whose file.
        buffer: What to read into.
        check_sha256: Whether to hash what is read, too. The tensors are all that the file holds, in
            its order.

    Attributes:
        faults: The first difference of each tensor, by its name.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tp_rank: int,
        buffer: ReadBuffer,
        check_sha256: bool = False,
    ) -> None:
        """Open the file, to be closed. Raises ManifestError."""
        self.faults: dict[str, str] = {}
        rank = manifest.mesh.rank(tp_rank)
        self._fd = open_shard(folder, manifest, rank)
        self._digest = RankDigest(folder, manifest, rank) if check_sha256 else None
        self._buffer = buffer
        self._path = folder / manifest.ranks[tp_rank].name
        self._pieces = manifest.ranks[tp_rank].pieces
        self._tp_rank = tp_rank
        self._offsets: dict[str, int] = {}
        self._name = ""

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def begin(self, spec: TensorSpec) -> None:
        """The next bytes are those of the rank's part of a tensor."""
        self._name = spec.name
        self._offsets[spec.name] = 0

    def write(self, parts: Iterable[memoryview]) -> None:
        """Compare the next bytes with the file's.

        Raises:
            ManifestError: If the file cannot be read.
            VerifyError: If what is hashed is not what the split wrote.
        """
        for part in parts:
            for at in range(0, len(part), COMPARED_BYTES):
                self._compare(part[at : at + COMPARED_BYTES])

    def finish(self) -> None:
        """Once all is compared: raise VerifyError unless the file's sha256 is the split's."""
        if self._digest:
            self._digest.finish()

    def _compare(self, expected: memoryview) -> None:
        offset, data = self._offsets[self._name], self._buffer.view[: len(expected)]
        try:
            read_exactly(self._fd, data, self._pieces[self._name].offset + offset)
        except OSError as error:
            raise ManifestError(f"{self._path}: cannot be read: {error.strerror}") from None
        if self._digest:
            self._digest.update(data)
        if self._name not in self.faults and not are_equal(data, expected):
            self.faults[self._name] = self._describe_fault(offset, bytes(data), bytes(expected))
        self._offsets[self._name] = offset + len(expected)

    def _describe_fault(self, offset: int, data: bytes, expected: bytes) -> str:
        first = offset + find_first_difference(data, expected)
        return (
            f"rank {self._tp_rank}: {self._name}: differs from the source at byte {first},"
            f" byte {self._pieces[self._name].offset + first} of {self._path.name}"
        )


def are_equal(one: memoryview, other: memoryview) -> bool:
    """Whether two buffers, which can be written to, hold the same bytes."""
    if len(one) != len(other) or not one:
        return len(one) == len(other)
    places = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (one, other))
    return not _memcmp(*places, len(one))


def check_weights(
    folder: Path, source: Checkpoint, progress: Progress, scope: Scope = EVERYTHING
) -> Check:
    """Compare the tensors of the ranks in scope with the source's bytes, replicas included.

    Args:
        folder: The shard folder.
        source: The unsharded checkpoint.
        progress: Is called with the number of bytes read since the last call.
        scope: Which files to check.

    Raises:
        ManifestError: A shard is missing, truncated, or of another split.
        LayoutError: The folder has no such rank or subset.
    """
    manifest = read_manifest(folder)
    ranks = scope.ranks_read(manifest.tp_size)
    copies = _list_copies(manifest, ranks)
    specs = [placement.spec for placement in manifest.plan.placements]
    faults = _compare_specs(specs, source.specs())
    if not faults:
        with _open_ranks(folder, manifest, ranks) as comparers:
            copy_tensors(PlainReader(source), copies, comparers, progress)
        faults = [fault for comparer in comparers for fault in comparer.faults.values()]
    if faults:
        more = [f"and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        summary = f"{len(faults)} pieces are not the source's"
        return Check("weights", "failed", summary, (*faults[:MAX_LISTED], *more))
    return _report_equality(scope, ranks, len(copies))


def prove_weights(
    folder: Path, manifest: Manifest, source: Checkpoint, progress: Progress, scope: Scope
) -> Check | None:
    """As `check_weights`, and in the same pass the digests of the files: each is read once.

    Returns:
        None if anything is wrong; `find_rank_faults` and `check_weights` tell what.
    """
    ranks = scope.ranks_read(manifest.tp_size)
    copies = _list_copies(manifest, ranks)
    if _compare_specs([p.spec for p in manifest.plan.placements], source.specs()):
        return None
    try:
        with _open_ranks(folder, manifest, ranks, check_sha256=True) as comparers:
            copy_tensors(PlainReader(source), copies, comparers, progress)
            for comparer in comparers:
                comparer.finish()
    except ShardkitError:
        return None
    if any(comparer.faults for comparer in comparers):
        return None
    return _report_equality(scope, ranks, len(copies))


def _report_equality(scope: Scope, ranks: Sequence[int], tensors: int) -> Check:
    where = "every rank" if scope.is_everything else f"rank {', '.join(map(str, ranks))}"
    summary = f"every byte of {tensors} tensors is the source's, on {where}"
    return Check("weights", "passed", summary, numbers={"tensors": tensors})


@contextmanager
def _open_ranks(
    folder: Path, manifest: Manifest, ranks: Sequence[int], check_sha256: bool = False
) -> Iterator[list[RankFileComparer]]:
    """The files of ranks, open. Raises ManifestError."""
    buffer, comparers = ReadBuffer(), list[RankFileComparer]()
    with ExitStack() as stack:
        for tp_rank in ranks:
            comparer = RankFileComparer(folder, manifest, tp_rank, buffer, check_sha256)
            comparers.append(comparer)
            stack.callback(comparer.close)
        yield comparers


def _list_copies(manifest: Manifest, ranks: Sequence[int]) -> list[TensorCopy]:
    """What the split copied to these ranks; the n-th of them is the n-th comparer."""
    copies = []
    for placement in manifest.storage_order:
        spans = dict(placement.destinations(manifest.mesh))
        destinations = tuple((n, spans[rank]) for n, rank in enumerate(ranks) if rank in spans)
        if destinations:
            copies.append(TensorCopy(placement.spec, placement.dim, destinations))
    return copies


def _compare_specs(shards: Sequence[TensorSpec], source: Sequence[TensorSpec]) -> list[str]:
    split, whole = {s.name: s for s in shards}, {s.name: s for s in source}
    faults = [f"{name}: in the shards, not in the source" for name in split.keys() - whole.keys()]
    faults += [f"{name}: in the source, not in the shards" for name in whole.keys() - split.keys()]
    for name in split.keys() & whole.keys():
        if split[name] != whole[name]:
            faults.append(
                f"{name}: {split[name].dtype} {list(split[name].shape)} in the shards,"
                f" {whole[name].dtype} {list(whole[name].shape)} in the source"
            )
    return sorted(faults)
