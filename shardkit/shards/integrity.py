"""Is a rank's file, byte for byte, the one that the split wrote?  Digests only, no torch."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from shardkit.errors import ManifestError, ShardkitError, VerifyError
from shardkit.shards.manifest import PREFIX_DIGITS, Manifest, list_stored_specs
from shardkit.shards.manifest_json import shard_header
from shardkit.shards.reader import ShardedCheckpoint, open_shard
from shardkit.tensor import TensorSpec

BLOCK = 4 << 20  # bytes read, then hashed while they are still in a core's cache
THREADS = 8
Progress = Callable[[int], object]


class RankReader:
    """A rank's open file, its pieces read one after another into the caller's memory.

    With `checked`, what is hashed is what the caller has: no second open, and no memory map, whose
    bytes could change later or vanish.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, tp_rank: int, checked: bool = True
    ) -> None:
        """Open the file.  Raises ManifestError unless its size and header are the split's."""
        self.specs = list_stored_specs(manifest.plan, tp_rank)  # in the order of the file
        self._rank = manifest.ranks[tp_rank]
        self._name = f"{folder / self._rank.name}: rank {tp_rank}"
        self._sha256 = sha256(shard_header(manifest, tp_rank)) if checked else None
        self._fd = open_shard(folder, manifest, tp_rank)

    def __enter__(self) -> "RankReader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, spec: TensorSpec, views: Iterable[memoryview]) -> None:
        """Fill the views, which together are as long as the piece, and check it.

        Checked pieces are read in the file's order, none left out.  Raises ManifestError for a file
        that cannot be read or became shorter, VerifyError for bytes that are not the split's.
        """
        at = self._rank.pieces[spec.name].offset
        for view in views:
            self._fill(view, at)
            at += len(view)
            if self._sha256:
                self._sha256.update(view)
        if (
            self._sha256
            and self._sha256.hexdigest()[:PREFIX_DIGITS]
            != self._rank.pieces[spec.name].prefix_sha256
        ):
            raise VerifyError(self._damaged(spec))

    def finish(self) -> None:
        """Once every piece is read: raise VerifyError unless the file's sha256 is the split's."""
        if self._sha256 and self._sha256.hexdigest() != self._rank.digest.sha256:
            raise VerifyError(
                f"{self._name}: sha256 {self._sha256.hexdigest()} is not the manifest's"
            )

    def _fill(self, view: memoryview, at: int) -> None:
        while view:
            try:
                count = os.preadv(self._fd, [view], at)
            except OSError as failure:
                raise ManifestError(f"{self._name}: cannot be read: {failure.strerror}") from None
            if count == 0:
                raise ManifestError(f"{self._name}: became shorter than byte {at + len(view)}")
            view, at = view[count:], at + count

    def _damaged(self, spec: TensorSpec) -> str:
        """Where damage begins.  Digests run on, so of what follows they can say nothing."""
        start, before = self._rank.pieces[spec.name].offset, self.specs.index(spec)
        return (
            f"{self._name}: {spec.name}: damaged between byte {start} and {start + spec.nbytes};"
            f" the {before} tensors before it are whole, the {len(self.specs) - before - 1} after"
            " it not judged; restore the file, or split again"
        )


def split_blocks(view: memoryview) -> Iterator[memoryview]:
    """A view in parts of at most a block."""
    for at in range(0, len(view), BLOCK):
        yield view[at : at + BLOCK]


def reuse_buffer(buffer: memoryview, nbytes: int, progress: Progress) -> Iterator[memoryview]:
    """One buffer again and again, `nbytes` in all, for bytes that are only hashed."""
    for at in range(0, nbytes, len(buffer)):
        view = buffer[: nbytes - at]
        yield view
        progress(len(view))


def check_rank(folder: Path, manifest: Manifest, tp_rank: int, progress: Progress) -> None:
    """Read a rank's file and raise VerifyError, naming the tensor, where damage begins.

    Raises ManifestError if the file is missing, of another size, or its header is not the split's.
    """
    buffer = memoryview(bytearray(BLOCK))
    with RankReader(folder, manifest, tp_rank) as reader:
        for spec in reader.specs:
            reader.read(spec, reuse_buffer(buffer, spec.nbytes, progress))
        reader.finish()


def check_ranks(shards: ShardedCheckpoint, progress: Progress) -> None:
    """Raise VerifyError naming every damaged file, and the tensor the damage begins in."""
    ranks = range(shards.manifest.tp_size)
    if faults := find_rank_faults(shards.folder, shards.manifest, ranks, progress):
        raise VerifyError("; ".join(faults))


def find_rank_faults(
    folder: Path, manifest: Manifest, ranks: Iterable[int], progress: Progress
) -> list[str]:
    """What is wrong with these ranks' files, one line for each that is not what was written."""

    def fault(tp_rank: int) -> str:
        try:
            check_rank(folder, manifest, tp_rank, progress)
        except ShardkitError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(filter(None, pool.map(fault, ranks)))
