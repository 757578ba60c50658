"""Opens the files of an output: new ones, or those that a stopped run has left."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256

from shardkit import strict_json
from shardkit.output.destination import as_output_error
from shardkit.output.journal import Entry, Journal, Run
from shardkit.output.publish import JOURNAL, Stage
from shardkit.output.stream import Job, Progress
from shardkit.output.writer import FileSink
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


def total_size(files: Files) -> int:
    """The bytes of all the files."""
    return sum(file.size for file in files.values())


def make_run(split_id: str, source: str, files: Files) -> Run:
    """What tells a run from every other whose files must not be gone on with."""
    headers = [[name, file.size, sha256(file.header).hexdigest()] for name, file in files.items()]
    return Run(split_id, source, sha256(strict_json.canonical(headers)).hexdigest())


def open_sinks(stage: Stage, run: Run, files: Files, progress: Progress) -> list[FileSink]:
    """A sink for each file, room for all of it reserved, behind what is written already.

    Whatever else the stage holds is removed.  Raises OutputError.
    """
    journal = Journal(stage, run)
    entries = {name: entry for name, entry in journal.resume().items() if name in files}
    stage.clear({JOURNAL, *entries})
    with as_output_error(stage.folder):
        sinks = _written(stage, journal, files, entries, progress)
        stage.clear({JOURNAL, *sinks})
        new = [name for name in files if name not in sinks]
        for name in new:
            sinks[name] = _sink(stage.create(name, files[name].size), journal, name, files[name])
        for name in new:
            sinks[name].feed([memoryview(files[name].header)])
    return [sinks[name] for name in files]


def left(jobs: Iterable[Job], sinks: Sequence[FileSink]) -> Iterator[Job]:
    """The jobs without what is behind the sinks already."""
    done = [set(sink.names) for sink in sinks]
    for job in jobs:
        takes = tuple(take for take in job.takes if job.spec.name not in done[take[0]])
        if takes:
            yield replace(job, takes=takes)


def _written(
    stage: Stage, journal: Journal, files: Files, entries: Mapping[str, Entry], progress: Progress
) -> dict[str, FileSink]:
    """The files whose first tensors are, by their bytes, those of the journal."""

    def is_written(name: str) -> bool:
        return _reread(sinks[name], files[name], entries[name], progress)

    sinks = {
        name: _sink(stage.reopen(name), journal, name, files[name])
        for name in entries
        if (stage.folder / name).exists()
    }
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        proven = list(pool.map(is_written, sinks))
    return {name: sink for (name, sink), ok in zip(sinks.items(), proven, strict=True) if ok}


def _sink(fd: int, journal: Journal, name: str, file: OutputFile) -> FileSink:
    def note(tensors: int, digest: str) -> None:
        journal.note(Entry(name, tensors, digest))

    return FileSink(fd, file.size, note)


def _reread(sink: FileSink, file: OutputFile, entry: Entry, progress: Progress) -> bool:
    """Bring a sink to where its file was left; whether the bytes are those that were written."""
    found = os.fstat(sink.fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
        return False
    if os.pread(sink.fd, len(file.header), 0) != file.header:
        return False
    sink.reread(len(file.header), lambda _: None)
    for spec in file.tensors[: entry.tensors]:
        sink.start(spec)
        sink.reread(spec.nbytes, progress)
    return sink.sha256 == entry.sha256
