"""Opens, reads and writes files: no links out of a folder, no devices, whole reads and writes."""

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from shardkit.errors import ShardkitError
from shardkit.strict_json import JsonError, quote

# What no file name here may hold: separators, control characters, and bytes that are not UTF-8.
_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_FILE_NAME = 255  # bytes, as Linux filesystems allow
MAX_VIEWS = 1024  # that Linux fills in one read

Progress = Callable[[int], object]
"""Called with how many more bytes are done, from any thread."""

ProgressCallback = Callable[[int, int], object]
"""Called with the bytes done so far, and the bytes in all; by one thread at a time."""


class ShortRead(OSError):
    """A file ended before the bytes that it had."""


def ignore_progress(_nbytes: int) -> None:
    """A Progress for callers that show none."""


def track_progress(total: int, callback: ProgressCallback | None) -> Progress:
    """A Progress that adds up bytes for a callback; several threads may call it."""
    if callback is None:
        return ignore_progress
    lock, done = Lock(), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            callback(done, total)

    return advance


def open_regular_file(path: Path, error: type[ShardkitError]) -> int:
    """A read-only descriptor of a regular file that is not a link. Raises `error`."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise error(f"{path}: not a regular file")
    return fd


def read_small_file(path: Path, limit: int, error: type[ShardkitError]) -> bytes:
    """The bytes of a file of at most `limit` bytes. Raises `error`."""
    fd = open_regular_file(path, error)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise error(f"{path}: {size} bytes, more than the {limit} allowed for such a file")
        try:
            return file.read(size)
        except OSError as failure:
            raise error(f"{path}: {failure.strerror}") from None


def read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` with a file's bytes from `offset` on. Raises OSError, ShortRead if it ends."""
    read_views(fd, [view], offset)


def read_views(fd: int, views: Iterable[memoryview], offset: int) -> None:
    """Fill views, one after another, with a file's bytes from `offset` on, in as few reads as go.

    One read of many blocks lets the kernel have more of the file on its way than a read of each.

    Raises:
        OSError: The file cannot be read.
        ShortRead: It ends before.
    """
    rest = deque(view for view in views if view)
    while rest:
        count = os.preadv(fd, list(islice(rest, MAX_VIEWS)), offset)
        if count == 0:
            raise ShortRead(errno.EIO, f"became shorter than byte {offset + sum(map(len, rest))}")
        offset += count
        while count and count >= len(rest[0]):
            count -= len(rest.popleft())
        if count:
            rest[0] = rest[0][count:]


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` where the file stands. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def is_plain_name(name: str) -> bool:
    """Whether `name` is one path component that can be printed on one line."""
    fits = 0 < len(name.encode(errors="replace")) <= MAX_FILE_NAME
    return fits and name not in (".", "..") and not _FORBIDDEN.search(name)


def read_file_name(value: Any, where: str) -> str:
    """The plain name of a file in the same folder, from JSON. Raises JsonError."""
    if not isinstance(value, str) or not is_plain_name(value):
        raise JsonError(f"{where}: {quote(value)} is not the name of a file in this folder")
    return value


def resolve_file(folder: Path, name: str, error: type[ShardkitError]) -> Path:
    """The file `name` of `folder`; a link is followed only if it stays inside what was named.

    A Hub cache keeps `snapshots/<revision>/name` as a link into `blobs/` beside it. Such a link,
    and one inside the folder, is followed once. Raises `error` for any other, or if `name` is not
    a base name.
    """
    if not is_plain_name(name):
        raise error(f"{folder}: {name[:80]!a} is not a file name in this folder")
    path = folder / name
    if not path.is_symlink():
        return path
    try:
        target = path.resolve()
        base = folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise error(f"{path}: is a link that leads nowhere") from None
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if target.parent not in allowed:
        raise error(f"{path}: links to {target}, outside the folder; put the file itself there")
    if not target.exists():
        raise error(f"{path}: is a link to a file that is not there; fetch it again")
    return target
