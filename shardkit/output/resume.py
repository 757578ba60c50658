"""Opens the files of an output: new ones, or those that a stopped run has left."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256

from shardkit import strict_json
from shardkit.output.destination import as_output_error
from shardkit.output.journal import Journal, JournalEntry, RunIdentity
from shardkit.output.publish import JOURNAL, StagingFolder
from shardkit.output.stream import Progress, TensorCopy
from shardkit.output.writer import FileWriter
from shardkit.tensor import TensorSpec


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: its header, and the tensors after it in order."""

    header: bytes
    tensors: Sequence[TensorSpec]

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors)


Files = Mapping[str, OutputFile]


def count_file_bytes(files: Files) -> int:
    """The bytes of all the files."""
    return sum(file.size for file in files.values())


def identify_run(split_id: str, source: str, files: Files) -> RunIdentity:
    """What tells a run from every other whose files must not be gone on with."""
    headers = [[name, file.size, sha256(file.header).hexdigest()] for name, file in files.items()]
    return RunIdentity(split_id, source, sha256(strict_json.encode_canonical(headers)).hexdigest())


def open_writers(
    stage: StagingFolder, run: RunIdentity, files: Files, progress: Progress
) -> list[FileWriter]:
    """A sink for each file, room for all of it reserved, behind what is written already.

    Whatever else the stage holds is removed.  Raises OutputError.
    """
    journal = Journal(stage, run)
    entries = {name: entry for name, entry in journal.read_entries().items() if name in files}
    stage.clear({JOURNAL, *entries})
    with as_output_error(stage.folder):
        sinks = _reopen_writers(stage, journal, files, entries, progress)
        stage.clear({JOURNAL, *sinks})
        new = [name for name in files if name not in sinks]
        for name in new:
            sinks[name] = _make_writer(
                stage.create(name, files[name].size), journal, name, files[name]
            )
        for name in new:
            sinks[name].write([memoryview(files[name].header)])
    return [sinks[name] for name in files]


def remaining_copies(
    jobs: Iterable[TensorCopy], sinks: Sequence[FileWriter]
) -> Iterator[TensorCopy]:
    """The jobs without what is behind the sinks already."""
    done = [set(sink.names) for sink in sinks]
    for job in jobs:
        takes = tuple(take for take in job.destinations if job.spec.name not in done[take[0]])
        if takes:
            yield replace(job, destinations=takes)


def _reopen_writers(
    stage: StagingFolder,
    journal: Journal,
    files: Files,
    entries: Mapping[str, JournalEntry],
    progress: Progress,
) -> dict[str, FileWriter]:
    """The files whose first tensors are, by their bytes, those of the journal."""

    def is_written(name: str) -> bool:
        return _is_unchanged(sinks[name], files[name], entries[name], progress)

    sinks = {
        name: _make_writer(stage.reopen(name), journal, name, files[name])
        for name in entries
        if (stage.folder / name).exists()
    }
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        proven = list(pool.map(is_written, sinks))
    return {name: sink for (name, sink), ok in zip(sinks.items(), proven, strict=True) if ok}


def _make_writer(fd: int, journal: Journal, name: str, file: OutputFile) -> FileWriter:
    def note(tensors: int, digest: str) -> None:
        journal.append(JournalEntry(name, tensors, digest))

    return FileWriter(fd, file.size, note)


def _is_unchanged(
    sink: FileWriter, file: OutputFile, entry: JournalEntry, progress: Progress
) -> bool:
    """Bring a sink to where its file was left; whether the bytes are those that were written."""
    found = os.fstat(sink.fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
        return False
    if os.pread(sink.fd, len(file.header), 0) != file.header:
        return False
    sink.rehash(len(file.header), lambda _: None)
    for spec in file.tensors[: entry.tensors]:
        sink.begin(spec)
        sink.rehash(spec.nbytes, progress)
    return sink.sha256 == entry.sha256
