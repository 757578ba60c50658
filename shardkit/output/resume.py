"""How far the files of an unfinished output have come, so that an interrupted run can be resumed.

`journal.jsonl` in the staging folder: a line that says what the run writes, from which source; then
a line for every stretch of a file that is safe on disk. A line is appended after the file is
synced, and is then synced itself. It is read as if it were hostile, and what it says is proven by
the file's own bytes before it counts.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from threading import Lock
from typing import Any

from shardkit.errors import OutputError
from shardkit.files import Progress, ignore_progress, read_file_name, read_small_file, write_all
from shardkit.output.available_memory import fits_page_cache
from shardkit.output.destination import as_output_error
from shardkit.output.publish import JOURNAL, StagingFolder
from shardkit.output.stream import TensorCopy
from shardkit.output.writer import FileWriter, Inspection
from shardkit.strict_json import JsonError, JsonObject, encode_canonical, parse_json, quote
from shardkit.tensor import TensorSpec

FORMAT = 1
MAX_BYTES = 64 << 20
MAX_TENSORS = 1_000_000
MAX_THREADS = 8  # each with a buffer
_WAY_OUT = "leave --resume out, and it is removed and all is written anew"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What a run writes and from what, all sha256: the split, the source's state, the headers."""

    split_id: str
    source: str
    files: str


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A file whose first `tensors` tensors are on disk, and its digest up to their end.

    The digest is empty if the run hashes nothing.
    """

    file: str
    tensors: int
    sha256: str


@dataclass(frozen=True, slots=True)
class JournalContents:
    """A journal as it was read: its run, its entries in order, and the bytes of its whole lines."""

    run: RunIdentity | None
    entries: tuple[JournalEntry, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: its header, and the tensors after it in order."""

    header: bytes
    tensors: Sequence[TensorSpec]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.size_up_to(len(self.tensors))

    def size_up_to(self, tensors: int) -> int:
        """The bytes of its header and its first `tensors` tensors."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors[:tensors])


Files = Mapping[str, OutputFile]


class Journal:
    """The journal of an output being written. It has no file until it has something to say."""

    def __init__(self, stage: StagingFolder, run: RunIdentity) -> None:
        """`stage` may have a journal already, to be read first."""
        self._stage = stage
        self._run = run
        self._lock = Lock()
        self._fd: int | None = None

    def read_entries(self) -> dict[str, JournalEntry]:
        """The last entry of each file, to resume from.

        Raises OutputError if the journal is another run's, or damaged.
        """
        path = self._stage.folder / JOURNAL
        if not path.exists():
            return {}
        try:
            contents = parse_journal(read_small_file(path, MAX_BYTES, OutputError))
        except JsonError as fault:
            raise OutputError(f"{path}: {fault}; {_WAY_OUT}") from None
        if contents.run is None:
            self._stage.clear()
            return {}
        if contents.run != self._run:
            raise OutputError(
                f"{path}: {_describe_difference(contents.run, self._run)}; {_WAY_OUT}"
            )
        with as_output_error(path):
            self._fd = self._stage.reopen(JOURNAL)
            os.ftruncate(self._fd, contents.nbytes)
            os.lseek(self._fd, 0, os.SEEK_END)
        return {entry.file: entry for entry in contents.entries}

    def append(self, entry: JournalEntry) -> None:
        """Record what is safe on disk. Raises OSError or OutputError."""
        with self._lock:
            lines = _encode_line(asdict(entry))
            if self._fd is None:
                self._fd = self._stage.create(JOURNAL, 0)
                lines = _encode_line({"format": FORMAT, **asdict(self._run)}) + lines
            write_all(self._fd, lines)
            os.fsync(self._fd)


def parse_journal(data: bytes) -> JournalContents:
    """A journal from its bytes; a last line that is incomplete is left out. Raises JsonError."""
    *lines, _ = data.split(b"\n")
    run, entries, nbytes = None, [], 0
    for at, line in enumerate(lines):
        try:
            if at == 0:
                run = _parse_run(parse_json(line))
            else:
                entries.append(_parse_entry(parse_json(line), f"line {at + 1}"))
        except JsonError:
            if at < len(lines) - 1:
                raise
            break
        nbytes += len(line) + 1
    return JournalContents(run, tuple(entries), nbytes)


def count_file_bytes(files: Files) -> int:
    """The bytes of all the files."""
    return sum(file.size for file in files.values())


def identify_run(split_id: str, source: str, files: Files) -> RunIdentity:
    """What distinguishes a run from every other whose files it must not resume."""
    headers = [[name, file.size, sha256(file.header).hexdigest()] for name, file in files.items()]
    return RunIdentity(split_id, source, sha256(encode_canonical(headers)).hexdigest())


def open_writers(
    stage: StagingFolder,
    run: RunIdentity,
    files: Files,
    progress: Progress,
    inspection: Inspection | None = None,
) -> list[FileWriter]:
    """A writer for each file, its whole size reserved, positioned behind what is on disk already.

    If nothing is hashed, it stands at the start and compares what is on disk. Whatever else the
    staging folder holds is removed. Raises OutputError.
    """
    journal = Journal(stage, run)
    entries = {name: entry for name, entry in journal.read_entries().items() if name in files}
    stage.clear({JOURNAL, *entries})
    with as_output_error(stage.folder):
        keeps_pages = fits_page_cache(sum(file.size for file in files.values()))
        make = partial(_make_writer, journal, inspection, keeps_pages)
        writers = _reopen_writers(stage, make, files, entries, progress)
        stage.clear({JOURNAL, *writers})
        for name in files:
            if name not in writers:
                fd = stage.create(name, files[name].size)
                writers[name] = make(name, files[name], fd)
        for name, writer in writers.items():
            if not writer.size:
                writer.write([memoryview(files[name].header)])
    return [writers[name] for name in files]


def remaining_copies(
    copies: Iterable[TensorCopy], writers: Sequence[FileWriter]
) -> Iterator[TensorCopy]:
    """The copies without what the writers have on disk already."""
    done = [set(writer.names) for writer in writers]
    for copy in copies:
        destinations = tuple(d for d in copy.destinations if copy.spec.name not in done[d[0]])
        if destinations:
            yield replace(copy, destinations=destinations)


def _reopen_writers(
    stage: StagingFolder,
    make: Callable[[str, OutputFile, int], FileWriter],
    files: Files,
    entries: Mapping[str, JournalEntry],
    progress: Progress,
) -> dict[str, FileWriter]:
    """The files whose first tensors are, by their bytes, those of the journal, or may be."""

    def is_unchanged(name: str) -> bool:
        return _is_unchanged(writers[name], files[name], entries[name], progress)

    writers = {
        name: make(name, files[name], stage.reopen(name))
        for name in entries
        if (stage.folder / name).exists()
    }
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(is_unchanged, writers))
    return {name: w for (name, w), ok in zip(writers.items(), verdicts, strict=True) if ok}


def _make_writer(
    journal: Journal,
    inspection: Inspection | None,
    keeps_pages: bool,
    name: str,
    file: OutputFile,
    fd: int,
) -> FileWriter:
    def record(tensors: int, digest: str) -> None:
        journal.append(JournalEntry(name, tensors, digest))

    return FileWriter(fd, file.size, record, inspection, keeps_pages)


def _is_unchanged(
    writer: FileWriter, file: OutputFile, entry: JournalEntry, progress: Progress
) -> bool:
    """Bring a writer to where its file was left; whether the bytes are those that were written."""
    state = os.fstat(writer.fd)
    if not stat.S_ISREG(state.st_mode) or state.st_size != file.size:
        return False
    if not entry.sha256:
        writer.keep(file.size_up_to(entry.tensors))
        return True
    if os.pread(writer.fd, len(file.header), 0) != file.header:
        return False
    writer.rehash(len(file.header), ignore_progress)
    for spec in file.tensors[: entry.tensors]:
        writer.begin(spec)
        writer.rehash(spec.nbytes, progress)
    return writer.sha256 == entry.sha256


def _describe_difference(actual: RunIdentity, wanted: RunIdentity) -> str:
    if actual.split_id != wanted.split_id:
        return f"of another split: {actual.split_id}, not {wanted.split_id}"
    if actual.source != wanted.source:
        return "the source was written to since"
    return "of other files, or another shardkit's"


def _encode_line(value: dict[str, Any]) -> bytes:
    return encode_canonical(value) + b"\n"


def _parse_run(value: Any) -> RunIdentity:
    fields = JsonObject(value, "line 1", "format split_id source files")
    if fields.integer("format") != FORMAT:
        raise JsonError(f"format {quote(fields.value('format'))}; this shardkit reads {FORMAT}")
    return RunIdentity(fields.hex("split_id"), fields.hex("source"), fields.hex("files"))


def _parse_entry(value: Any, where: str) -> JournalEntry:
    fields = JsonObject(value, where, "file tensors sha256")
    tensors = fields.integer("tensors", MAX_TENSORS)
    digest = fields.hex("sha256") if fields.value("sha256") else ""
    return JournalEntry(fields.read("file", read_file_name), tensors, digest)
