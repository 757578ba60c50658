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
from itertools import zip_longest
from typing import Protocol

from shardkit.checkpoint.source import Source
from shardkit.files import Progress
from shardkit.layout import Span, num_indices
from shardkit.output.rows import RowPart, cut_rows, pack_rows
from shardkit.output.serial_pool import SerialPool, Task
from shardkit.tensor import ByteView, TensorSpec, byte_view

NUM_CORES = min(8, max(2, os.cpu_count() or 2))  # that a copy can keep busy
NUM_BUFFERS = min(8, NUM_CORES + 3)  # read ahead while others are hashed and written
# Per buffer: on two cores, half as much costs a tenth of the time, and twice as much saves nothing.
BUFFER_BYTES = (20 << 20) // NUM_BUFFERS // 4096 * 4096


class BlockReader(Protocol):
    """What blocks are read from."""

    def read_block(self, name: str, offset: int, view: memoryview) -> Iterable[tuple[int, Task]]:
        """Fill `view` with a tensor's bytes from `offset` on.

        Returns:
            By a number, what is to be done with the block in a thread before `view` is filled anew;
            one after another, in the order of the blocks, if the number is the same.
        """

    def read_rows(
        self, name: str, offset: int, view: memoryview, width: int
    ) -> tuple[Sequence[RowPart], Iterable[tuple[int, Task]]]:
        """As `read_block`, of whole rows, of `width` bytes each.

        Returns:
            Where the rows lie now, part by part, in `view` or in buffers that are kept as long.
        """


@dataclass(frozen=True, slots=True)
class PlainReader:
    """The blocks of a source, with nothing to be done but to copy them."""

    source: Source

    def read_block(self, name: str, offset: int, view: memoryview) -> Iterable[tuple[int, Task]]:
        """As `BlockReader` says."""
        self.source.read_into(name, offset, view)
        return ()

    def read_rows(
        self, name: str, offset: int, view: memoryview, width: int
    ) -> tuple[Sequence[RowPart], Iterable[tuple[int, Task]]]:
        """As `BlockReader` says."""
        self.source.read_into(name, offset, view)
        return (RowPart(view, width, 0, width),), ()


class TensorWriter(Protocol):
    """What receives one output file's bytes, in order."""

    def begin(self, spec: TensorSpec) -> None:
        """The next bytes are those of a tensor, or of a part of it."""

    def write(self, parts: Iterable[memoryview]) -> None:
        """Take the next bytes, from buffers that can be written to."""


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """One tensor to copy: the spans of `dim` that go to each writer, by its number."""

    spec: TensorSpec
    dim: int | None
    destinations: tuple[tuple[int, tuple[Span, ...]], ...]


@dataclass(slots=True)
class _Buffer:
    """A reused buffer, and the work that must end before it is reused."""

    data: bytearray
    busy: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Until the buffer is free; raises what the work raised."""
        for future in self.busy:
            future.result()
        self.busy.clear()


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
        if view.outer > 1 and view.row <= self._buffer_bytes:
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
            buffer, data = self._next(min(step, total - start))
            rows, tasks = self._reader.read_rows(copy.spec.name, start, data, view.row)
            self._submit_reads(buffer, tasks)
            for writer, spans in copy.destinations:
                ranges = [Span(first * view.inner, last * view.inner) for first, last in spans]
                parts = cut_rows(rows, ranges)
                self._feed(writer, buffer, pack_rows(parts, len(data) // view.row))
                self._progress(len(data) // view.row * num_indices(spans) * view.inner)

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
                self._progress(len(data))

    def _read(self, copy: TensorCopy, start: int, stop: int) -> tuple[_Buffer, memoryview]:
        buffer, data = self._next(stop - start)
        self._submit_reads(buffer, self._reader.read_block(copy.spec.name, start, data))
        return buffer, data

    def _next(self, nbytes: int) -> tuple[_Buffer, memoryview]:
        """The buffer whose turn it is, once it is free, and as much of it as is to be filled."""
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        buffer.wait()
        return buffer, memoryview(buffer.data)[:nbytes]

    def _submit_reads(self, buffer: _Buffer, tasks: Iterable[tuple[int, Task]]) -> None:
        for number, task in tasks:
            buffer.busy.append(self._submit("read", number, task))

    def _feed(self, writer: int, buffer: _Buffer, pieces: Iterable[memoryview]) -> None:
        buffer.busy.append(
            self._submit("write", writer, partial(self._writers[writer].write, pieces))
        )

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
