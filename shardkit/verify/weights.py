"""Level 2: every byte of every rank's pieces is the source's, in the place the layout says.

The same stream that writes shards runs over the source again, into sinks that compare.
"""

import os
from collections.abc import Callable, Sequence

from shardkit.checkpoint import Checkpoint
from shardkit.manifest import RankFile, stored_order
from shardkit.shards import ShardedCheckpoint
from shardkit.split import takes
from shardkit.stream import Job, copy
from shardkit.tensor import TensorSpec
from shardkit.verify.report import Check

SHOWN = 8


class CompareSink:
    """Compares a rank's file with the bytes it should hold; the first difference of each tensor."""

    def __init__(self, fd: int, rank: RankFile, tp_rank: int) -> None:
        self.faults: dict[str, str] = {}
        self._fd = fd
        self._pieces = rank.pieces
        self._tp_rank = tp_rank
        self._at: dict[str, int] = {}
        self._name = ""

    def start(self, name: str) -> None:
        """The next bytes are those of tensor `name`."""
        self._name = name
        self._at[name] = 0

    def feed(self, parts: Sequence[memoryview]) -> None:
        """Compare the next bytes with the file's."""
        for part in parts:
            at = self._at[self._name]
            found = os.pread(self._fd, len(part), self._pieces[self._name].offset + at)
            if self._name not in self.faults and found != bytes(part):
                self.faults[self._name] = self._fault(at, found, bytes(part))
            self._at[self._name] = at + len(part)

    def _fault(self, at: int, found: bytes, expected: bytes) -> str:
        pairs = zip(found, expected, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(found))
        return f"rank {self._tp_rank}: {self._name}: differs from the source at byte {at + first}"


def check_weights(
    shards: ShardedCheckpoint, source: Checkpoint, progress: Callable[[int], object]
) -> Check:
    """Compare every rank's pieces with the source's bytes, replicas included."""
    manifest = shards.manifest
    faults = _spec_faults(shards.specs(), source.specs())
    if not faults:
        sinks = [
            CompareSink(fd, rank, tp_rank)
            for tp_rank, (fd, rank) in enumerate(zip(shards.fds, manifest.ranks, strict=True))
        ]
        order = stored_order(manifest.plan.placements)
        jobs = [Job(p.spec, p.dim, takes(p, manifest.tp_size)) for p in order]
        copy(source, jobs, sinks, progress)
        faults = [fault for sink in sinks for fault in sink.faults.values()]
    count = len(manifest.placements)
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        summary = f"{len(faults)} pieces are not the source's"
        return Check("weights", "failed", summary, (*faults[:SHOWN], *more))
    return Check(
        "weights", "passed", f"every byte of {count} tensors is the source's, on every rank",
        numbers={"tensors": count},
    )  # fmt: skip


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
