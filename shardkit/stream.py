"""Streams tensors from a source into files: each source byte read once, each output byte written
once, digests taken on the way, in constant memory.

A tensor's bytes are `[outer, axis, inner]` around its sharded dimension.  Blocks of them pass
through a few reused buffers; reading runs ahead while threads hash and write, because hashlib,
zlib and the system calls all release the interpreter lock.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from shardkit.checkpoint.source import Source
from shardkit.layout import Span, length
from shardkit.tensor import ByteView, TensorSpec, byte_view

BLOCK = 8 << 20  # bytes per buffer
SLOTS = 3  # buffers: one being read, the others being hashed and written
Progress = Callable[[int], object]


class Sink(Protocol):
    """What receives one output file's bytes, in order."""

    def feed(self, parts: Sequence[memoryview]) -> None:
        """Take the next bytes."""

    def start(self, name: str) -> None:
        """The next bytes are those of tensor `name`."""


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to copy: the spans of `dim` that each sink takes, by the sink's number."""

    spec: TensorSpec
    dim: int | None
    takes: tuple[tuple[int, tuple[Span, ...]], ...]


@dataclass(slots=True)
class _Slot:
    """A reused buffer, and the work that must end before it is reused."""

    data: bytearray
    busy: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Until the buffer is free; raises what the work raised."""
        for future in self.busy:
            future.result()
        self.busy.clear()


def copy(
    source: Source, jobs: Sequence[Job], sinks: Sequence[Sink], progress: Progress
) -> dict[str, str]:
    """Run the jobs in order.  Returns each whole tensor's sha256, by name."""
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), "shardkit") as pool:
        return _Copier(source, sinks, pool, progress).run(jobs)


def digests(source: Source, progress: Progress) -> dict[str, str]:
    """Each whole tensor's sha256, by name, in constant memory."""
    return copy(source, [Job(spec, None, ()) for spec in source.specs()], (), progress)


class FileSink:
    """An output file, written once from its start, hashed whole and by tensor on the way."""

    def __init__(self, fd: int, first: bytes) -> None:
        """`first` is the file's header, the bytes before the first tensor."""
        self.fd = fd
        self.size = 0
        self.crcs: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        self._sha256 = hashlib.sha256()
        self._name = ""
        self._write(memoryview(first))

    @property
    def sha256(self) -> str:
        """The digest of everything written so far."""
        return self._sha256.hexdigest()

    def start(self, name: str) -> None:
        """The next bytes are those of tensor `name`."""
        self._name = name
        self.crcs[name] = 0
        self.offsets[name] = self.size

    def feed(self, parts: Sequence[memoryview]) -> None:
        """Write and hash the next bytes of the current tensor.  Raises OSError."""
        for part in parts:
            self.crcs[self._name] = zlib.crc32(part, self.crcs[self._name])
            self._write(part)

    def _write(self, view: memoryview) -> None:
        self._sha256.update(view)
        while view:
            count = os.write(self.fd, view)
            self.size += count
            view = view[count:]


class _Copier:
    """One run of `copy`: the buffers, and the last task of each consumer, which run in order."""

    def __init__(
        self, source: Source, sinks: Sequence[Sink], pool: ThreadPoolExecutor, progress: Progress
    ) -> None:
        self._source = source
        self._sinks = sinks
        self._pool = pool
        self._progress = progress
        self._slots = [_Slot(bytearray(BLOCK)) for _ in range(SLOTS)]
        self._last: dict[int, Future[None]] = {}
        self._turn = 0

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        hashes = {}
        for job in jobs:
            hashes[job.spec.name] = self._run(job)
        for slot in self._slots:
            slot.wait()
        return {name: digest.hexdigest() for name, digest in hashes.items()}

    def _run(self, job: Job) -> "hashlib._Hash":
        digest = hashlib.sha256()
        view = byte_view(job.spec, job.dim)
        ordered = [take for take in job.takes if _ascending(take[1])]
        repeated = [take for take in job.takes if not _ascending(take[1])]
        slot = self._next()
        for sink, _ in job.takes:
            self._after(sink, slot, self._sinks[sink].start, job.spec.name)
        for start, stop in blocks(view):
            slot, data = self._read(job, start, stop)
            slot.busy.append(self._submit(-1, digest.update, data))
            for sink, spans in ordered:
                if parts := cuts(view, spans, start, stop):
                    self._after(sink, slot, self._feed, sink, data, start, parts)
            self._progress(stop - start)
        for sink, spans in repeated:
            self._repeat(job, view, sink, spans)
        return digest

    def _repeat(self, job: Job, view: ByteView, sink: int, spans: tuple[Span, ...]) -> None:
        """Spans that go back on the axis (copies of kv heads) are read in their own order."""
        for outer in range(view.outer):
            for span in spans:
                first = outer * view.row + span.start * view.inner
                last = outer * view.row + span.stop * view.inner
                for start in range(first, last, BLOCK):
                    stop = min(start + BLOCK, last)
                    slot, data = self._read(job, start, stop)
                    parts = [(start, stop)]
                    self._after(sink, slot, self._feed, sink, data, start, parts)

    def _read(self, job: Job, start: int, stop: int) -> tuple[_Slot, memoryview]:
        slot = self._next()
        data = memoryview(slot.data)[: stop - start]
        self._source.read_into(job.spec.name, start, data)
        return slot, data

    def _next(self) -> _Slot:
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        slot.wait()
        return slot

    def _feed(
        self, sink: int, data: memoryview, base: int, parts: Sequence[tuple[int, int]]
    ) -> None:
        self._sinks[sink].feed(gathered(data, base, parts))

    def _after(self, sink: int, slot: _Slot, task: Callable[..., None], *args: object) -> None:
        slot.busy.append(self._submit(sink, task, *args))

    def _submit(self, consumer: int, task: Callable[..., None], *args: object) -> Future[None]:
        before = self._last.get(consumer)
        future = self._pool.submit(_in_turn, before, task, *args)
        self._last[consumer] = future
        return future


def _in_turn(before: Future[None] | None, task: Callable[..., None], *args: object) -> None:
    """Run a task after the one before it for the same consumer; a failure stops the chain."""
    if before is not None:
        before.result()
    task(*args)


def blocks(view: ByteView, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The tensor in order as byte ranges of at most `size`: whole rows where several fit in one."""
    total = view.outer * view.row
    step = size if view.row > size or not view.row else size - size % view.row
    if view.row > size:
        for row in range(view.outer):
            for start in range(row * view.row, (row + 1) * view.row, step):
                yield start, min(start + step, (row + 1) * view.row)
        return
    for start in range(0, total, step):
        yield start, min(start + step, total)


def cuts(view: ByteView, spans: Sequence[Span], start: int, stop: int) -> list[tuple[int, int]]:
    """The byte ranges of `[start, stop)` that the spans hold, in the tensor's own order."""
    found = []
    for outer in range(start // view.row, -(-stop // view.row)):
        base = outer * view.row
        for span in spans:
            first = max(base + span.start * view.inner, start)
            last = min(base + span.stop * view.inner, stop)
            if first < last:
                found.append((first, last))
    return found


def gathered(
    data: memoryview, base: int, parts: Sequence[tuple[int, int]]
) -> Sequence[memoryview]:
    """The parts of a block: as they lie where they are few, joined where they are many."""
    views = [data[start - base : stop - base] for start, stop in parts]
    return views if len(views) <= 4 else [memoryview(b"".join(views))]


def _ascending(spans: Sequence[Span]) -> bool:
    return all(a.stop <= b.start for a, b in zip(spans, spans[1:], strict=False))


def taken(spec: TensorSpec, dim: int | None, spans: Sequence[Span]) -> int:
    """The bytes the spans of a tensor hold."""
    view = byte_view(spec, dim)
    return view.outer * length(spans) * view.inner
