"""How far the files of an unfinished output have come, so that a stopped run can be gone on with.

`journal.jsonl` in the stage: a line that says what the run writes, from which source; then a line
for every stretch of a file that is safe on disk.  A line is appended after the file is synced, and
is then synced itself.  It is read as if it were hostile, and what it says is proven by the file's
own bytes before it counts.
"""

import os
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

from shardkit import strict_json
from shardkit.errors import OutputError
from shardkit.files import read_small_file
from shardkit.json_fields import JsonObject
from shardkit.output.destination import as_output_error
from shardkit.output.publish import JOURNAL, StagingFolder
from shardkit.strict_json import JsonError, quote

FORMAT = 1
MAX_BYTES = 64 << 20
MAX_TENSORS = 1_000_000


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What a run writes and from what, all sha256: the split, the source's state, the headers."""

    split_id: str
    source: str
    files: str


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A file whose first `tensors` tensors are on disk, and its digest up to their end."""

    file: str
    tensors: int
    sha256: str


@dataclass(frozen=True, slots=True)
class JournalContents:
    """A journal as it was read: its run, its entries in order, and the bytes that were whole."""

    run: RunIdentity | None
    entries: tuple[JournalEntry, ...]
    nbytes: int


def parse_journal(data: bytes) -> JournalContents:
    """A journal from its bytes; a last line that was torn is left out.  Raises JsonError."""
    *lines, _ = data.split(b"\n")
    run, entries, nbytes = None, [], 0
    for at, line in enumerate(lines):
        try:
            if at == 0:
                run = _parse_run(strict_json.parse_json(line))
            else:
                entries.append(_parse_entry(strict_json.parse_json(line), f"line {at + 1}"))
        except JsonError:
            if at < len(lines) - 1:
                raise
            break
        nbytes += len(line) + 1
    return JournalContents(run, tuple(entries), nbytes)


class Journal:
    """The journal of an output being written.  It is no file before it has something to say."""

    def __init__(self, stage: StagingFolder, run: RunIdentity) -> None:
        """`stage` may have a journal already, for `read_entries`."""
        self._stage = stage
        self._run = run
        self._lock = Lock()
        self._fd: int | None = None

    def read_entries(self) -> dict[str, JournalEntry]:
        """The last entry of each file, to go on from.

        Raises OutputError if the journal is of another run, or damaged.
        """
        path = self._stage.folder / JOURNAL
        if not path.exists():
            return {}
        try:
            record = parse_journal(read_small_file(path, MAX_BYTES, OutputError))
        except JsonError as fault:
            raise OutputError(f"{path}: {fault}; {_WAY_OUT}") from None
        if record.run is None:
            self._stage.clear()
            return {}
        if record.run != self._run:
            raise OutputError(f"{path}: {_describe_difference(record.run, self._run)}; {_WAY_OUT}")
        with as_output_error(path):
            self._fd = self._stage.reopen(JOURNAL)
            os.ftruncate(self._fd, record.nbytes)
            os.lseek(self._fd, 0, os.SEEK_END)
        return {entry.file: entry for entry in record.entries}

    def append(self, entry: JournalEntry) -> None:
        """Record what is safe on disk.  Raises OSError or OutputError."""
        with self._lock:
            lines = _encode_line(asdict(entry))
            if self._fd is None:
                self._fd = self._stage.create(JOURNAL, 0)
                lines = _encode_line({"format": FORMAT, **asdict(self._run)}) + lines
            view = memoryview(lines)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)


_WAY_OUT = "leave --resume out, and it is removed and all is written anew"


def _describe_difference(found: RunIdentity, wanted: RunIdentity) -> str:
    if found.split_id != wanted.split_id:
        return f"of another split: {found.split_id}, not {wanted.split_id}"
    if found.source != wanted.source:
        return "the source was written to since"
    return "of other files, or another shardkit's"


def _encode_line(value: dict[str, Any]) -> bytes:
    return strict_json.encode_canonical(value) + b"\n"


def _parse_run(value: Any) -> RunIdentity:
    fields = JsonObject(value, "line 1", "format split_id source files")
    if fields.integer("format") != FORMAT:
        raise JsonError(f"format {quote(fields.value('format'))}; this shardkit reads {FORMAT}")
    return RunIdentity(fields.hex("split_id"), fields.hex("source"), fields.hex("files"))


def _parse_entry(value: Any, where: str) -> JournalEntry:
    fields = JsonObject(value, where, "file tensors sha256")
    tensors = fields.integer("tensors", MAX_TENSORS)
    return JournalEntry(fields.file_name("file"), tensors, fields.hex("sha256"))
