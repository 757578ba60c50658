"""What a block-by-block verification has done, in a file, so that one that was stopped resumes.

The first line identifies the verification. After it comes an entry for each call of a block, and a
line for each run that ended. Nothing is changed later, so the file is always a beginning of the
whole. What a killed process left incomplete at its end is dropped.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from shardkit.errors import OutputError
from shardkit.strict_json import JsonError, JsonObject, encode_canonical, parse_json
from shardkit.verification.journal_entries import (
    CallNotes,
    encode_call,
    parse_call,
    parse_call_line,
)

FORMAT = 1
MAX_LINE = 16 << 20
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
WAY_OUT = "name another file, or remove it to start anew"


@dataclass
class BlockJournal:
    """An open journal.

    Attributes:
        path: Where it is.
        file: The open file, positioned at its end.
        calls: The calls of each run, in order, as they were read.
        ended: The runs that ended.
    """

    path: Path
    file: BinaryIO
    calls: dict[str, list[CallNotes]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    _starts: dict[str, int] = field(default_factory=dict)

    def append_call(self, notes: CallNotes) -> None:
        """Note a call. Raises OutputError."""
        self._starts.setdefault(notes.run, self.file.tell())
        self._write(encode_call(notes))

    def append_end(self, run: str) -> None:
        """Note that a run ended. Raises OutputError."""
        self._write(encode_canonical({"end": run}) + b"\n")

    def forget_run(self, run: str) -> None:
        """Forget a run, and those after it."""
        start = self._starts.get(run, self.file.tell())
        for name in [name for name, at in self._starts.items() if at >= start]:
            del self._starts[name]
            self.calls.pop(name, None)
            self.ended.discard(name)
        self._cut(start)

    def remove(self) -> None:
        """Remove the file: the verification has finished."""
        self.path.unlink(missing_ok=True)

    def read_entries(self, identity: Mapping[str, str]) -> None:
        """Read what there is, drop what is incomplete, and identify a new file.

        Raises OutputError if the file is of another verification, or is not a journal.
        """
        first = encode_canonical({"format": FORMAT, "identity": dict(identity)}) + b"\n"
        line = self.file.readline(MAX_LINE)
        if line != first:
            if not first.startswith(line):
                raise OutputError(f"{self.path}: {_describe_other(line, identity)}; {WAY_OUT}")
            self._cut(0)
            self._write(first)
            return
        end = self.file.tell()
        while self._read_entry(end):
            end = self.file.tell()
        self._cut(end)

    def _read_entry(self, start: int) -> bool:
        """Read the next entry; whether it is complete."""
        text = self.file.readline(MAX_LINE)
        try:
            value = parse_json(text)
            if isinstance(value, dict) and "end" in value:
                self.ended.add(JsonObject(value, "line", "end").string("end"))
                return text.endswith(b"\n")
            line = parse_call_line(value)
            if line.nbytes > os.fstat(self.file.fileno()).st_size - self.file.tell():
                return False
            notes = parse_call(line, self.file.read(line.nbytes))
        except JsonError:
            return False
        self.calls.setdefault(notes.run, []).append(notes)
        self._starts.setdefault(notes.run, start)
        return True

    def _cut(self, nbytes: int) -> None:
        self.file.seek(nbytes)
        self.file.truncate()

    def _write(self, data: bytes) -> None:
        try:
            self.file.write(data)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror or error}") from None


@contextmanager
def open_journal(path: Path | None, identity: Mapping[str, str]) -> Iterator[BlockJournal | None]:
    """In a `with`, the journal of a verification; None if there is no path.

    Raises:
        OutputError: The file cannot be written, is in use, or is not of this verification.
    """
    if path is None:
        yield None
        return
    try:
        file = os.fdopen(os.open(path, FLAGS, 0o600), "r+b")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from None
    with file:
        with contextlib.suppress(OSError):  # of filesystems without locks
            _lock_file(file, path)
        journal = BlockJournal(path, file)
        journal.read_entries(identity)
        yield journal


def _lock_file(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{path}: another verification writes it; name another file") from None


def _describe_other(line: bytes, identity: Mapping[str, str]) -> str:
    """How another file's first line differs."""
    try:
        noted = JsonObject(parse_json(line), "line 1", "format identity").labels("identity")
    except JsonError:
        return "is not a journal of a verification"
    names = [name for name in {**identity, **noted} if identity.get(name) != noted.get(name)]
    return f"is of a verification with another {', '.join(names) or 'format'}"
