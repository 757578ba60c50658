"""Level 2: every byte of every rank's tensors is the source's, in the place the layout says.

The stream that writes shards runs over the source again, into writers that compare.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from shardkit.checkpoint import Checkpoint
from shardkit.errors import ManifestError
from shardkit.files import Progress
from shardkit.output import PlainReader, TensorCopy, copy_tensors
from shardkit.shards import Manifest, find_first_difference, open_shard, read_manifest
from shardkit.tensor import TensorSpec
from shardkit.verification.report import Check
from shardkit.verification.scope import EVERYTHING, Scope

MAX_LISTED = 8


class RankFileComparer:
    """Compares a rank's file with the bytes it should hold; a TensorWriter that writes nothing.

    Attributes:
        faults: The first difference of each tensor, by its name.
    """

    def __init__(self, folder: Path, manifest: Manifest, tp_rank: int) -> None:
        """Open the file, to be closed. Raises ManifestError."""
        self.faults: dict[str, str] = {}
        self._fd = open_shard(folder, manifest, manifest.mesh.rank(tp_rank))
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

    def write(self, parts: Sequence[memoryview]) -> None:
        """Compare the next bytes with the file's. Raises ManifestError if it cannot be read."""
        for part in parts:
            offset = self._offsets[self._name]
            try:
                data = os.pread(self._fd, len(part), self._pieces[self._name].offset + offset)
            except OSError as error:
                raise ManifestError(f"{self._path}: cannot be read: {error.strerror}") from None
            if self._name not in self.faults and data != bytes(part):
                self.faults[self._name] = self._describe_fault(offset, data, bytes(part))
            self._offsets[self._name] = offset + len(part)

    def _describe_fault(self, offset: int, data: bytes, expected: bytes) -> str:
        first = offset + find_first_difference(data, expected)
        return (
            f"rank {self._tp_rank}: {self._name}: differs from the source at byte {first},"
            f" byte {self._pieces[self._name].offset + first} of {self._path.name}"
        )


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
        with ExitStack() as stack:
            comparers = []
            for tp_rank in ranks:
                comparers.append(RankFileComparer(folder, manifest, tp_rank))
                stack.callback(comparers[-1].close)
            copy_tensors(PlainReader(source), copies, comparers, progress)
        faults = [fault for comparer in comparers for fault in comparer.faults.values()]
    if faults:
        more = [f"and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        summary = f"{len(faults)} pieces are not the source's"
        return Check("weights", "failed", summary, (*faults[:MAX_LISTED], *more))
    where = "every rank" if scope.is_everything else f"rank {', '.join(map(str, ranks))}"
    summary = f"every byte of {len(copies)} tensors is the source's, on {where}"
    return Check("weights", "passed", summary, numbers={"tensors": len(copies)})


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
