"""Reads a system-call trace (`strace -f -y`) and says what a loss of power could undo.

A rename that publishes is only as good as what was synced before it: every file's last write comes
before a sync of it, every sync before the rename, the renamed folder is itself synced after the
last name in it was made, and the folder that has the new name is synced after the rename.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,fallocate,ftruncate,fsync,fdatasync,"
    "rename,renameat,renameat2,unlink,unlinkat"
)
WRITES = {"write", "pwrite64", "writev", "pwritev", "pwritev2", "fallocate", "ftruncate"}
SYNCS = {"fsync", "fdatasync"}
RENAMES = {"rename", "renameat", "renameat2"}
BEGUN = re.compile(r"^(\d+) +(\w+)\((.*)$")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")


@dataclass(frozen=True)
class Call:
    """A call that succeeded: the lines of the trace it began and ended on, and its paths."""

    begin: int
    end: int
    name: str
    text: str

    @property
    def opened(self) -> PurePath:
        """The path of the descriptor that is the first argument."""
        found = re.match(r"\d+<(.*?)>", self.text)
        return PurePath(found[1] if found else "?")

    @property
    def named(self) -> list[PurePath]:
        """The paths that are written out, each relative to the folder named before it."""
        base = PurePath("/")
        paths = []
        for folder, name in re.findall(r'(?:AT_FDCWD|\d+)<(.*?)>|"((?:[^"\\]|\\.)*)"', self.text):
            if folder:
                base = PurePath(folder)
            else:
                paths.append(base / name)
        return paths


def calls(trace: str) -> Iterator[Call]:
    """The calls that succeeded, in the order they ended; those of several threads overlap."""
    begun: dict[str, tuple[int, str, str]] = {}
    for at, line in enumerate(trace.splitlines()):
        if (found := BEGUN.match(line)) and "<unfinished ...>" in line:
            begun[found[1]] = at, found[2], found[3].split(" <unfinished")[0]
            continue
        if found:
            begin, name, text = at, found[2], found[3]
        elif (found := RESUMED.match(line)) and found[1] in begun:
            begin, name, text = begun.pop(found[1])
            text += found[3]
        else:
            continue
        if not re.search(r" = -1 E\w+ ", text + " "):
            yield Call(begin, at, name, text)


def faults(trace: str, out: str) -> list[str]:
    """What is not safe when `out` is published, one line each; nothing for a sound writer."""
    made = list(calls(trace))
    published = [c for c in made if c.name in RENAMES and c.named[-1] == PurePath(out)]
    if not published:
        return ["nothing was published by a rename"]
    rename = published[-1]
    stage = rename.named[0]
    return [
        *_unsynced_files(made, rename, stage),
        *_unsynced_names(made, rename, stage),
        *_written_late(made, rename, {stage, PurePath(out)}),
        *_parent(made, rename, PurePath(out).parent),
    ]


def _unsynced_files(made: list[Call], rename: Call, stage: PurePath) -> Iterator[str]:
    last: dict[PurePath, int] = {}
    for call in made:
        if call.name in WRITES and _in(call.opened, {stage}):
            last[call.opened] = max(call.end, last.get(call.opened, 0))
        elif (
            call.name in ("open", "openat", "creat")
            and _creates(call)
            and call.begin < rename.begin
        ):
            last.setdefault(call.named[-1], call.end)
        elif call.name in ("unlink", "unlinkat") and call.begin < rename.begin:
            last.pop(call.named[-1], None)
    for path, write in last.items():
        synced = [c for c in made if c.name in SYNCS and c.opened == path and c.begin > write]
        if _in(path, {stage}) and not any(c.end < rename.begin for c in synced):
            yield f"{path.name}: not synced between its last write and the rename"


def _unsynced_names(made: list[Call], rename: Call, stage: PurePath) -> Iterator[str]:
    changes = [
        call.end for call in made
        if call.begin < rename.begin and (_creates(call) or call.name in ("unlink", "unlinkat"))
        and call.named[-1].parent == stage
    ]  # fmt: skip
    if changes and not any(
        c.name == "fsync" and c.opened == stage and c.begin > max(changes) and c.end < rename.begin
        for c in made
    ):
        yield f"{stage.name}: the folder is not synced after the last name in it changed"


def _written_late(made: list[Call], rename: Call, roots: set[PurePath]) -> Iterator[str]:
    for call in made:
        if call.name in WRITES and _in(call.opened, roots) and call.end > rename.begin:
            yield f"{call.opened.name}: written after the rename"


def _parent(made: list[Call], rename: Call, parent: PurePath) -> Iterator[str]:
    if not any(c.name == "fsync" and c.opened == parent and c.begin > rename.end for c in made):
        yield f"{parent.name}: the folder is not synced after the rename"


def _creates(call: Call) -> bool:
    return call.name == "creat" or (call.name in ("open", "openat") and "O_CREAT" in call.text)


def _in(path: PurePath, roots: set[PurePath]) -> bool:
    return bool(roots & {path, *path.parents})
