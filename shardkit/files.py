"""Opens files without being led astray: no links out of the folder, no devices, no surprises."""

import os
import re
import stat
from pathlib import Path

from shardkit.errors import ShardkitError

# What no file name here may hold: separators, control characters, and bytes that are not UTF-8.
_UNFIT = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_NAME = 255


def open_regular_file(path: Path, error: type[ShardkitError]) -> int:
    """A read-only descriptor of a regular file that is no link.  Raises `error`."""
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
    """The bytes of a file of at most `limit` bytes.  Raises `error`."""
    fd = open_regular_file(path, error)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise error(f"{path}: {size} bytes, more than the {limit} allowed for such a file")
        try:
            return file.read(limit)
        except OSError as failure:
            raise error(f"{path}: {failure.strerror}") from None


def is_plain_name(name: str) -> bool:
    """Whether `name` is one path component that can be printed on one line."""
    fits = 0 < len(name.encode(errors="replace")) <= MAX_NAME
    return fits and name not in (".", "..") and not _UNFIT.search(name)


def resolve_file(folder: Path, name: str, error: type[ShardkitError]) -> Path:
    """The file `name` of `folder`, a link followed only where it cannot leave what was named.

    A Hub cache keeps `snapshots/<revision>/name` as a link into `blobs/` beside it; that, and links
    inside the folder, are followed once.  Raises `error` for any other link, or a name that is no
    base name.
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
    return target
