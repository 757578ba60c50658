"""An output file as the streaming copy fills it: inspected on the way, noted as it is safe."""

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from shardkit.files import Progress, read_exactly
from shardkit.output.nonfinite import count_nonfinite
from shardkit.tensor import TensorSpec

REREAD_BYTES = 2 << 20  # reread at once
WRITE_BACK_BYTES = 4 << 20  # bytes written to a file before the kernel is told to start on them
CACHED_BYTES = 32 << 20  # of a file whose pages are dropped: those that may still be on their way
JOURNAL_INTERVAL = (
    1 << 30
)  # bytes written to a file between two entries of the journal, from which a run can resume
SYNC_FILE_RANGE_WRITE = 2
SYNC_FILE_RANGE_WAIT = 1 | 2 | 4  # for what is on its way, and for what is written now

_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is to be known of the bytes of files that are written.

    Attributes:
        digests: Whether to hash them. If not, what an interrupted run left is compared, when it is
            resumed, with what is to be written.
        counted: The tensors of which to count NaN and infinite values; None for all.
    """

    digests: bool = True
    counted: Container[str] | None = None

    def counts(self, spec: TensorSpec) -> bool:
        """Whether to count NaN and infinite values of a tensor."""
        return self.counted is None or spec.name in self.counted


class FileWriter:
    """An output file, written once from its start and inspected on the way.

    Args:
        fd: An open, empty file, or one that is to be rehashed or kept first.
        total: The bytes it will have, a header first.
        record: Called with how many tensors are safe on disk, and the digest of the file up to
            there, empty if there is none: between tensors, after every JOURNAL_INTERVAL bytes, and
            at the end of a file of as many.
        inspection: What is to be known of its bytes.
        keeps_pages: Whether what is written stays in the page cache. If files are larger than
            memory, they would only take the place of what other programs use.

    Attributes:
        size: The bytes written so far.
        nonfinite: How many values are NaN or infinite, of each tensor that has any.
    """

    def __init__(
        self,
        fd: int,
        total: int,
        record: Callable[[int, str], object],
        inspection: Inspection | None = None,
        keeps_pages: bool = True,
    ) -> None:
        self.fd = fd
        self.size = 0
        self.nonfinite: dict[str, int] = {}
        self._total = total
        self._record = record
        self._inspection = inspection or Inspection()
        self._recorded = 0
        self._flushed = 0
        self._dropped: int | None = None if keeps_pages else 0
        self._kept = 0
        self._sha256 = hashlib.sha256() if self._inspection.digests else None
        self._starts: list[tuple[str, int]] = []
        self._ends: list[str] = []
        self._spec: TensorSpec | None = None

    @property
    def sha256(self) -> str:
        """The digest of everything written so far; empty if it is not hashed."""
        return self._sha256.hexdigest() if self._sha256 else ""

    @property
    def names(self) -> list[str]:
        """The tensors begun so far."""
        return [name for name, _ in self._starts]

    @property
    def prefix_digests(self) -> dict[str, tuple[int, str]]:
        """Each tensor's first byte, and the sha256 of the file up to its end; once all written."""
        ends = [*self._ends, self.sha256][1:]
        return {name: (at, end) for (name, at), end in zip(self._starts, ends, strict=True)}

    def begin(self, spec: TensorSpec) -> None:
        """The next bytes are those of the file's part of a tensor. Raises OSError."""
        if self.size - self._recorded >= JOURNAL_INTERVAL:
            self._secure()
        self._ends.append(self.sha256)
        self._starts.append((spec.name, self.size))
        self._spec = spec

    def write(self, parts: Iterable[memoryview]) -> None:
        """Inspect and write the next bytes. Raises OSError."""
        for view in parts:
            self._inspect(view)
            view = self._skip_kept(view)
            while view:
                count = os.pwrite(self.fd, view, self.size)
                self.size += count
                view = view[count:]
        if self.size - self._flushed >= WRITE_BACK_BYTES:
            start_write_back(self.fd, self._flushed, self.size - self._flushed)
            self._flushed = self.size
            if self._dropped is not None and self.size - self._dropped >= 2 * CACHED_BYTES:
                drop_pages(self.fd, self._dropped, CACHED_BYTES)
                self._dropped += CACHED_BYTES
        if self._recorded < self.size == self._total and self._total >= JOURNAL_INTERVAL:
            self._secure()

    def rehash(self, count: int, progress: Progress) -> None:
        """Hash the next bytes, which the file has already. Raises OSError."""
        buffer = memoryview(bytearray(min(REREAD_BYTES, count)))
        stop = self.size + count
        while self.size < stop:
            part = buffer[: stop - self.size]
            read_exactly(self.fd, part, self.size)
            self._inspect(part)
            self.size += len(part)
            progress(len(part))
        self._recorded = self._flushed = self.size

    def keep(self, count: int) -> None:
        """The file has `count` bytes already, to be compared with the next that are written."""
        self._kept = self._recorded = self._flushed = count

    def _skip_kept(self, view: memoryview) -> memoryview:
        """What of the next bytes is to be written, as the file does not have it. Raises OSError."""
        kept = view[: max(0, self._kept - self.size)]
        if kept and os.pread(self.fd, len(kept), self.size) != kept:
            self._kept, kept = 0, view[:0]
        self.size += len(kept)
        return view[len(kept) :]

    def _inspect(self, view: memoryview) -> None:
        """Take the next bytes, whole values of a tensor unless they are the header."""
        if self._sha256:
            self._sha256.update(view)
        spec = self._spec
        if spec and self._inspection.counts(spec) and (count := count_nonfinite(view, spec.dtype)):
            self.nonfinite[spec.name] = self.nonfinite.get(spec.name, 0) + count

    def _secure(self) -> None:
        os.fdatasync(self.fd)
        self._record(len(self._starts), self.sha256)
        self._recorded = self.size


def drop_pages(fd: int, offset: int, count: int) -> None:
    """Wait until a range is written to disk, and have the kernel keep no copy of it in memory.

    What could not be written is an error here, since the kernel says so only once: no later sync
    would. Nothing is done if the system has no sync_file_range(2). Raises OSError.
    """
    if _sync_file_range is None:
        return
    span = ctypes.c_int64(offset), ctypes.c_int64(count)
    if _sync_file_range(fd, *span, SYNC_FILE_RANGE_WAIT):
        number = ctypes.get_errno()
        if number == errno.ENOSYS:
            return
        raise OSError(number, os.strerror(number))
    os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)


def start_write_back(fd: int, offset: int, count: int) -> None:
    """Have the kernel start writing a range to disk, so that the sync at the end finds little left.

    Only a hint: Linux sync_file_range(2) if there is one, and nothing elsewhere.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(count), SYNC_FILE_RANGE_WRITE)
