"""Level 2: every byte of every rank's pieces is the source's, in the place the layout says.

The same stream that writes shards runs over the source again, into sinks that compare.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from shardkit.checkpoint import Checkpoint
from shardkit.errors import ManifestError
from shardkit.files import Progress
from shardkit.output.stream import TensorCopy, copy_tensors
from shardkit.shards.manifest import Manifest
from shardkit.shards.manifest_json import read_manifest
from shardkit.shards.reader import find_first_difference, open_shard
from shardkit.tensor import TensorSpec
from shardkit.verification.files import EVERYTHING
from shardkit.verification.report import Check
from shardkit.verification.scope import Scope

SHOWN = 8


class CompareSink:
    """Compares a rank's file with the bytes it should hold; the first difference of each tensor."""

    def __init__(self, folder: Path, manifest: Manifest, tp_rank: int) -> None:
        """Open the file, to be closed.  Raises ManifestError."""
        self.faults: dict[str, str] = {}
        self._fd = open_shard(folder, manifest, manifest.mesh.rank(tp_rank))
        self._path = folder / manifest.ranks[tp_rank].name
        self._pieces = manifest.ranks[tp_rank].pieces
        self._tp_rank = tp_rank
        self._at: dict[str, int] = {}
        self._name = ""

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def begin(self, spec: TensorSpec) -> None:
        """The next bytes are those of the rank's part of a tensor."""
        self._name = spec.name
        self._at[spec.name] = 0

    def write(self, parts: Sequence[memoryview]) -> None:
        """Compare the next bytes with the file's.  Raises ManifestError if it cannot be read."""
        for part in parts:
            at = self._at[self._name]
            try:
                found = os.pread(self._fd, len(part), self._pieces[self._name].offset + at)
            except OSError as failure:
                raise ManifestError(f"{self._path}: cannot be read: {failure.strerror}") from None
            if self._name not in self.faults and found != bytes(part):
                self.faults[self._name] = self._fault(at, found, bytes(part))
            self._at[self._name] = at + len(part)

    def _fault(self, at: int, found: bytes, expected: bytes) -> str:
        first = at + find_first_difference(found, expected)
        return (
            f"rank {self._tp_rank}: {self._name}: differs from the source at byte {first},"
            f" byte {self._pieces[self._name].offset + first} of {self._path.name}"
        )


def check_weights(
    folder: Path, source: Checkpoint, progress: Progress, scope: Scope = EVERYTHING
) -> Check:
    """Compare the pieces of the ranks in scope with the source's bytes, replicas included.

    Raises ManifestError for a shard that is missing, cut short or of another split.
    """
    manifest = read_manifest(folder)
    ranks = scope.read(manifest.tp_size)
    jobs = _jobs(manifest, ranks)
    specs = [placement.spec for placement in manifest.plan.placements]
    faults = _spec_faults(specs, source.specs())
    if not faults:
        with ExitStack() as opened:
            sinks = []
            for tp_rank in ranks:
                sinks.append(CompareSink(folder, manifest, tp_rank))
                opened.callback(sinks[-1].close)
            copy_tensors(source, jobs, sinks, progress)
        faults = [fault for sink in sinks for fault in sink.faults.values()]
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        summary = f"{len(faults)} pieces are not the source's"
        return Check("weights", "failed", summary, (*faults[:SHOWN], *more))
    where = "every rank" if scope.whole else f"rank {', '.join(map(str, ranks))}"
    return Check(
        "weights", "passed", f"every byte of {len(jobs)} tensors is the source's, on {where}",
        numbers={"tensors": len(jobs)},
    )  # fmt: skip


def _jobs(manifest: Manifest, ranks: Sequence[int]) -> list[TensorCopy]:
    """What the split copied to these ranks; the n-th of them is sink n."""
    jobs = []
    for placement in manifest.storage_order:
        taken = dict(placement.destinations(manifest.mesh))
        held = tuple((sink, taken[rank]) for sink, rank in enumerate(ranks) if rank in taken)
        if held:
            jobs.append(TensorCopy(placement.spec, placement.dim, held))
    return jobs


def _spec_faults(ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> list[str]:
    mine, other = {s.name: s for s in ours}, {s.name: s for s in theirs}
    faults = [f"{name}: in the shards, not in the source" for name in mine.keys() - other.keys()]
    faults += [f"{name}: in the source, not in the shards" for name in other.keys() - mine.keys()]
    for name in mine.keys() & other.keys():
        if mine[name] != other[name]:
            faults.append(
                f"{name}: {mine[name].dtype} {list(mine[name].shape)} in the shards,"
                f" {other[name].dtype} {list(other[name].shape)} in the source"
            )
    return sorted(faults)
