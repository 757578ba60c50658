"""Streams tensors from a source into files: each source byte read once, each output byte written
once, digests taken on the way, in constant memory.

A tensor's bytes are `[outer, axis, inner]` around its sharded dimension. Blocks of them pass
through a few reused buffers; reading runs ahead while threads hash and write, because hashlib,
zlib and the system calls all release the interpreter lock.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, zip_longest
from typing import Protocol

from shardkit.checkpoint.source import Source
from shardkit.files import Progress
from shardkit.layout import Span, num_indices
from shardkit.output.serial_pool import SerialPool, Task
from shardkit.tensor import ByteView, TensorSpec, byte_view

NUM_CORES = min(8, max(2, os.cpu_count() or 2))  # that a copy can keep busy
NUM_BUFFERS = min(8, NUM_CORES + 3)  # read ahead while others are hashed and written
# Per buffer: on two cores, half as much costs a tenth of the time, and twice as much saves nothing.
BUFFER_BYTES = (20 << 20) // NUM_BUFFERS // 4096 * 4096
PACKED_BYTES = 128 << 10  # joined at once, to stay in a core's cache


class BlockReader(Protocol):
    """What blocks are read from."""

    def read_block(self, name: str, offset: int, view: memoryview) -> Iterable[tuple[int, Task]]:
        """Fill `view` with a tensor's bytes from `offset` on.

        Returns:
            By a number, what is to be done with the block in a thread before `view` is filled anew;
            one after another, in the order of the blocks, if the number is the same.
        """


@dataclass(frozen=True, slots=True)
class PlainReader:
    """The blocks of a source, with nothing to be done but to copy them."""

    source: Source

    def read_block(self, name: str, offset: int, view: memoryview) -> Iterable[tuple[int, Task]]:
        """As `BlockReader` says."""
        self.source.read_into(name, offset, view)
        return ()


class TensorWriter(Protocol):
    """What receives one output file's bytes, in order."""

    def begin(self, spec: TensorSpec) -> None:
        """The next bytes are those of a tensor, or of a part of it."""

    def write(self, parts: Sequence[memoryview]) -> None:
        """Take the next bytes."""


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """One tensor to copy: the spans of `dim` that go to each writer, by its number."""

    spec: TensorSpec
    dim: int | None
    destinations: tuple[tuple[int, tuple[Span, ...]], ...]


@dataclass(slots=True)
class _Buffer:
    """Reused buffers, and the work that must end before they are reused.

    `data` holds a block as it was read; `packed` the parts of one that are many and small,
    of which `used` bytes are taken.
    """

    data: bytearray
    packed: bytearray = field(default_factory=bytearray)
    used: int = 0
    busy: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Until the buffer is free; raises what the work raised."""
        for future in self.busy:
            future.result()
        self.busy.clear()
        self.used = 0

    def room(self, size: int) -> memoryview:
        """A part of `packed` to pack `size` bytes into, allocated anew only if it is short."""
        if self.used + size > len(self.packed):
            self.packed, self.used = bytearray(max(size, len(self.data))), 0
        self.used += size
        return memoryview(self.packed)[self.used - size : self.used]


def copy_tensors(
    reader: BlockReader,
    copies: Sequence[TensorCopy],
    writers: Sequence[TensorWriter],
    progress: Progress,
    buffer_bytes: int | None = None,
) -> None:
    """Run the copies in order. Raises what the reader, its tasks or a writer raises."""
    with SerialPool(NUM_CORES) as pool:
        _Copier(reader, writers, pool, progress, buffer_bytes or BUFFER_BYTES).run(copies)


class _Copier:
    """One run of `copy_tensors`: the buffers, and the last of the tasks that run in order."""

    def __init__(
        self,
        reader: BlockReader,
        writers: Sequence[TensorWriter],
        pool: SerialPool,
        progress: Progress,
        buffer_bytes: int,
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._reader = reader
        self._writers = writers
        self._pool = pool
        self._progress = progress
        self._buffers = [_Buffer(bytearray(buffer_bytes)) for _ in range(NUM_BUFFERS)]
        self._last: dict[tuple[str, int], Future[None]] = {}
        self._turn = 0

    def run(self, copies: Sequence[TensorCopy]) -> None:
        for copy in copies:
            self._run(copy)
        for buffer in self._buffers:
            buffer.wait()
        for future in self._last.values():
            future.result()

    def _run(self, copy: TensorCopy) -> None:
        view = byte_view(copy.spec, copy.dim)
        for writer, _ in copy.destinations:
            self._submit("write", writer, partial(self._writers[writer].begin, copy.spec))
        if (
            view.outer > 1
            and view.row <= self._buffer_bytes
            and all(_is_ascending(s) for _, s in copy.destinations)
        ):
            self._by_rows(copy, view)
        else:
            self._by_runs(copy, view)

    def _by_rows(self, copy: TensorCopy, view: ByteView) -> None:
        """Small rows of which every writer gets a part: read whole, many at a time."""
        if not view.row:
            return
        step = self._buffer_bytes - self._buffer_bytes % view.row
        total = view.outer * view.row
        for start in range(0, total, step):
            buffer, data = self._read(copy, start, min(start + step, total))
            for writer, spans in copy.destinations:
                room = buffer.room(len(data) // view.row * num_indices(spans) * view.inner)
                task = partial(self._feed_rows, writer, view, spans, data, room)
                buffer.busy.append(self._submit("write", writer, task))
                self._progress(len(room))

    def _by_runs(self, copy: TensorCopy, view: ByteView) -> None:
        """Long runs, each writer's in its own order, and the writers in turn, so that all are busy.

        A range that several writers get, as a replicated tensor's, is read once.
        """
        runs = [iter_chunks(view, spans, self._buffer_bytes) for _, spans in copy.destinations]
        for turn in zip_longest(*runs):
            last, buffer, data = None, self._buffers[0], memoryview(b"")
            for (writer, _), chunk in zip(copy.destinations, turn, strict=True):
                if chunk is None:
                    continue
                if chunk != last:
                    buffer, data = self._read(copy, *chunk)
                    last = chunk
                self._feed(writer, buffer, [data])

    def _read(self, copy: TensorCopy, start: int, stop: int) -> tuple[_Buffer, memoryview]:
        buffer = self._next()
        data = memoryview(buffer.data)[: stop - start]
        for number, task in self._reader.read_block(copy.spec.name, start, data):
            buffer.busy.append(self._submit("read", number, task))
        return buffer, data

    def _next(self) -> _Buffer:
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        buffer.wait()
        return buffer

    def _feed(self, writer: int, buffer: _Buffer, parts: Sequence[memoryview]) -> None:
        buffer.busy.append(
            self._submit("write", writer, partial(self._writers[writer].write, parts))
        )
        self._progress(sum(map(len, parts)))

    def _feed_rows(
        self, writer: int, view: ByteView, spans: Sequence[Span], data: memoryview, room: memoryview
    ) -> None:
        pack_rows(view, spans, data, room)
        self._writers[writer].write([room])

    def _submit(self, kind: str, number: int, task: Task) -> Future[None]:
        """Run a task in a thread, after the one before it of the same kind and number."""
        self._last[kind, number] = future = self._pool.submit((kind, number), task)
        return future


def iter_chunks(
    view: ByteView, spans: Sequence[Span], buffer_bytes: int
) -> Iterator[tuple[int, int]]:
    """What the spans hold, in their own order, as byte ranges of the tensor of at most a block."""
    for outer in range(view.outer):
        for span in spans:
            first = outer * view.row + span.start * view.inner
            last = outer * view.row + span.stop * view.inner
            for start in range(first, last, buffer_bytes):
                yield start, min(start + buffer_bytes, last)


def pack_rows(view: ByteView, spans: Sequence[Span], data: memoryview, room: memoryview) -> None:
    """Fill `room` with what the spans hold of `data`, which is whole rows, in order.

    Many parts are joined at once: to assign each takes three times as long, and other threads wait.
    """
    cuts = [(first * view.inner, last * view.inner) for first, last in spans]
    width = sum(last - first for first, last in cuts)
    step = view.row * max(1, PACKED_BYTES // max(1, width))
    at = 0
    for start in range(0, len(data), step):
        rows = range(start, min(start + step, len(data)), view.row)
        packed = b"".join([data[row + a : row + b] for row in rows for a, b in cuts])
        room[at : at + len(packed)] = packed
        at += len(packed)


def _is_ascending(spans: Sequence[Span]) -> bool:
    """Whether no index is held twice: copies, packed, would outgrow a buffer."""
    return all(a.stop <= b.start for a, b in pairwise(spans))
