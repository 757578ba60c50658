"""Renames, exchanges, syncs and removes a folder of files as a whole.

rename(2) and renameat2(2) are atomic; names are on disk once their folder is synced, fsync(2).
"""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
NO_RENAMEAT2 = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def rename_no_replace(old: Path, new: Path) -> None:
    """Rename, failing if `new` has appeared meanwhile. Raises OSError.

    If the filesystem has no renameat2 (NFS), rename replaces at most an empty folder.
    """
    try:
        _renameat2(old, new, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in NO_RENAMEAT2:
            raise
        old.rename(new)


def exchange_folders(one: Path, two: Path) -> None:
    """Atomically swap two folders, renameat2(2) with RENAME_EXCHANGE. Raises OSError."""
    _renameat2(one, two, RENAME_EXCHANGE)


def can_exchange(folder: Path) -> bool:
    """Whether the folder's filesystem can exchange two names, tried inside it. Raises OSError."""
    names = folder / "one", folder / "two"
    for name in names:
        name.write_bytes(b"")
    try:
        exchange_folders(*names)
    except OSError as error:
        if error.errno not in NO_RENAMEAT2:
            raise
        return False
    finally:
        for name in names:
            name.unlink(missing_ok=True)
    return True


def sync_folder(folder: Path) -> None:
    """fsync the folder, so that its names are on disk. Raises OSError."""
    fd = open_folder(folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_folder(folder: Path) -> None:
    """Remove a folder of files. What another run removes meanwhile is no error; raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        fd = open_folder(folder)
        try:
            for name in os.listdir(fd):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
        folder.rmdir()


def discard_folder(folder: Path) -> None:
    """Remove a folder of files, trying once more if that fails."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            remove_folder(folder)


def open_folder(folder: Path) -> int:
    """A descriptor of a folder that is not a link. Raises OSError."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _renameat2(old: Path, new: Path, flag: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
