"""Streams tensors from a source into files: each source byte read once, each output byte written
once, digests taken on the way, in constant memory.

A tensor's bytes are `[outer, axis, inner]` around its sharded dimension.  Blocks of them pass
through a few reused buffers; reading runs ahead while threads hash and write, because hashlib,
zlib and the system calls all release the interpreter lock.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Protocol

from shardkit.checkpoint.source import Source
from shardkit.layout.spans import Span, num_indices
from shardkit.tensor import ByteView, TensorSpec, byte_view

BLOCK = 2 << 20  # bytes per buffer: what is hashed is still in a core's cache when written
SLOTS = 8  # buffers: read ahead while others are hashed and written
Progress = Callable[[int], object]


class TensorWriter(Protocol):
    """What receives one output file's bytes, in order."""

    def begin(self, spec: TensorSpec) -> None:
        """The next bytes are those of a tensor, or of a part of it."""

    def write(self, parts: Sequence[memoryview]) -> None:
        """Take the next bytes."""


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """One tensor to copy: the spans of `dim` that each sink takes, by the sink's number."""

    spec: TensorSpec
    dim: int | None
    destinations: tuple[tuple[int, tuple[Span, ...]], ...]


@dataclass(slots=True)
class _Slot:
    """Reused buffers, and the work that must end before they are reused.

    `data` holds a block as it was read; `staged` the parts of one that are many and small, packed,
    of which `used` bytes are taken.
    """

    data: bytearray
    staged: bytearray = field(default_factory=bytearray)
    used: int = 0
    busy: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Until the buffer is free; raises what the work raised."""
        for future in self.busy:
            future.result()
        self.busy.clear()
        self.used = 0

    def room(self, size: int) -> memoryview:
        """A part of `staged` to pack `size` bytes into, made anew only where it is short."""
        if self.used + size > len(self.staged):
            self.staged, self.used = bytearray(max(size, len(self.data))), 0
        self.used += size
        return memoryview(self.staged)[self.used - size : self.used]


def copy_tensors(
    source: Source, jobs: Sequence[TensorCopy], sinks: Sequence[TensorWriter], progress: Progress
) -> None:
    """Run the jobs in order.  Raises what the source or a sink raises."""
    with ThreadPoolExecutor(2 + min(8, os.cpu_count() or 2), "shardkit") as pool:
        _Copier(source, sinks, pool, progress).run(jobs)


class _Copier:
    """One run of `copy_tensors`: the buffers, and the last task of each consumer, which run in order."""

    def __init__(
        self,
        source: Source,
        sinks: Sequence[TensorWriter],
        pool: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self._source = source
        self._sinks = sinks
        self._pool = pool
        self._progress = progress
        self._slots = [_Slot(bytearray(BLOCK)) for _ in range(SLOTS)]
        self._last: dict[int, Future[None]] = {}
        self._turn = 0

    def run(self, jobs: Sequence[TensorCopy]) -> None:
        for job in jobs:
            self._run(job)
        for slot in self._slots:
            slot.wait()
        for future in self._last.values():
            future.result()

    def _run(self, job: TensorCopy) -> None:
        view = byte_view(job.spec, job.dim)
        for sink, _ in job.destinations:
            self._submit(sink, self._sinks[sink].begin, job.spec)
        if (
            view.outer > 1
            and view.row <= BLOCK
            and all(_is_ascending(s) for _, s in job.destinations)
        ):
            self._by_rows(job, view)
        else:
            self._by_runs(job, view)

    def _by_rows(self, job: TensorCopy, view: ByteView) -> None:
        """Small rows of which every sink takes a part: read whole, many at a time."""
        if not view.row:
            return
        step = BLOCK - BLOCK % view.row
        total = view.outer * view.row
        for start in range(0, total, step):
            slot, data = self._read(job, start, min(start + step, total))
            for sink, spans in job.destinations:
                room = slot.room(len(data) // view.row * num_indices(spans) * view.inner)
                work = self._submit(sink, self._feed_rows, sink, view, spans, data, room)
                slot.busy.append(work)
                self._progress(len(room))

    def _by_runs(self, job: TensorCopy, view: ByteView) -> None:
        """Long runs, each sink's in its own order, and the sinks in turn, so that all are busy.

        A range that several sinks take, as a replicated tensor's, is read once.
        """
        runs = [iter_chunks(view, spans) for _, spans in job.destinations]
        for turn in zip_longest(*runs):
            last, slot, data = None, self._slots[0], memoryview(b"")
            for (sink, _), chunk in zip(job.destinations, turn, strict=True):
                if chunk is None:
                    continue
                if chunk != last:
                    slot, data = self._read(job, *chunk)
                    last = chunk
                self._feed(sink, slot, [data])

    def _read(self, job: TensorCopy, start: int, stop: int) -> tuple[_Slot, memoryview]:
        slot = self._next()
        data = memoryview(slot.data)[: stop - start]
        self._source.read_into(job.spec.name, start, data)
        return slot, data

    def _next(self) -> _Slot:
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        slot.wait()
        return slot

    def _feed(self, sink: int, slot: _Slot, parts: Sequence[memoryview]) -> None:
        slot.busy.append(self._submit(sink, self._sinks[sink].write, parts))
        self._progress(sum(map(len, parts)))

    def _feed_rows(
        self, sink: int, view: ByteView, spans: Sequence[Span], data: memoryview, room: memoryview
    ) -> None:
        pack_rows(view, spans, data, room)
        self._sinks[sink].write([room])

    def _submit(self, sink: int, task: Callable[..., None], *args: object) -> Future[None]:
        """Run a task in a thread, after the sink's task before it."""
        before = self._last.get(sink)
        future = self._pool.submit(_run_in_turn, before, task, *args)
        self._last[sink] = future
        return future


def _run_in_turn(before: Future[None] | None, task: Callable[..., None], *args: object) -> None:
    """Run a task after the one before it for the same consumer; a failure stops the chain."""
    if before is not None:
        before.result()
    task(*args)


def iter_chunks(view: ByteView, spans: Sequence[Span]) -> Iterator[tuple[int, int]]:
    """What the spans hold, in their own order, as byte ranges of the tensor of at most a block."""
    for outer in range(view.outer):
        for span in spans:
            first = outer * view.row + span.start * view.inner
            last = outer * view.row + span.stop * view.inner
            for start in range(first, last, BLOCK):
                yield start, min(start + BLOCK, last)


def pack_rows(view: ByteView, spans: Sequence[Span], data: memoryview, room: memoryview) -> None:
    """Fill `room` with what the spans hold of `data`, which is whole rows, in order."""
    cuts = [(first * view.inner, last * view.inner) for first, last in spans]
    at = 0
    for row in range(0, len(data), view.row):
        for first, last in cuts:
            room[at : at + last - first] = data[row + first : row + last]
            at += last - first


def _is_ascending(spans: Sequence[Span]) -> bool:
    """Whether no index is held twice: copies, packed, would outgrow a buffer."""
    return all(a.stop <= b.start for a, b in pairwise(spans))
