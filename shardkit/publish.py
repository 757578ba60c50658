"""Publishes an output folder whole or not at all.

Everything is written to a stage folder beside the output, each file synced, and the stage renamed
over nothing in one step.  A refused run writes nothing, a failed one removes its stage, and a
killed one leaves a stage that the next run of the same split removes.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardkit.errors import OutputError

AT_FDCWD = -100
RENAME_NOREPLACE = 1
NO_RENAMEAT2 = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class Stage:
    """An output being written."""

    def __init__(self, folder: Path) -> None:
        """`folder` exists, is empty, and is ours alone."""
        self.folder = folder
        self._open: dict[str, int] = {}

    def create(self, name: str, size: int) -> int:
        """A new file of the stage, `size` bytes reserved on disk.  Raises OutputError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with as_output_error(self.folder / name):
            fd = os.open(self.folder / name, flags, 0o666)
            self._open[name] = fd
            if size:
                os.posix_fallocate(fd, 0, size)
        return fd

    def finish(self, name: str) -> None:
        """Sync and close a file, everything written.  Raises OutputError."""
        fd = self._open.pop(name)
        with as_output_error(self.folder / name):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def write(self, name: str, data: bytes) -> None:
        """A whole small file, synced.  Raises OutputError."""
        fd = self.create(name, 0)
        view = memoryview(data)
        with as_output_error(self.folder / name):
            while view:
                view = view[os.write(fd, view) :]
        self.finish(name)

    def close(self) -> None:
        """Close what is still open."""
        while self._open:
            os.close(self._open.popitem()[1])


def check_absent(out: Path) -> None:
    """Raise OutputError if the output is there, or cannot be made."""
    if out.is_symlink() or out.exists():
        raise OutputError(f"{out}: exists, and is never written into; name another, or remove it")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such folder to write {out.name} in")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: not writable")


def check_space(out: Path, nbytes: int) -> None:
    """Raise OutputError unless the output's filesystem has room for `nbytes` and 1 % more."""
    usage = os.statvfs(out.absolute().parent)
    free = usage.f_bavail * usage.f_frsize
    if free < nbytes * 1.01:
        raise OutputError(
            f"{out}: needs {nbytes * 1.01 / 1e9:.2f} GB, and its filesystem has {free / 1e9:.2f} GB"
            " free; make room, or write elsewhere"
        )


@contextlib.contextmanager
def publishing(out: Path, split_id: str) -> Iterator[Stage]:
    """A stage that becomes `out` when the block ends well, and is removed when it does not.

    Raises OutputError if `out` exists, or another run is writing the same split there.
    """
    check_absent(out)
    parent = out.absolute().parent
    folder = parent / f".{out.name}.shardkit-stage-{split_id[:16]}"
    lock = _claim(folder)
    stage = Stage(folder)
    try:
        yield stage
        stage.close()
        with as_output_error(out):
            _sync_folder(folder)
            _rename_over_nothing(folder, parent / out.name)
            _sync_folder(parent)
    except BaseException:
        stage.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turn an OSError about an output into an OutputError of one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from None


def _claim(folder: Path) -> int:
    """Make the stage and lock it; one left by a killed run is emptied.  Raises OutputError."""
    with as_output_error(folder):
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(lock, folder)
            for path in folder.iterdir():
                path.unlink()
        except BaseException:
            os.close(lock)
            raise
    return lock


def _lock(lock: int, folder: Path) -> None:
    """Lock the open stage, which must still be the one of that name.  Raises OutputError."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(lock), folder.stat())
    except BlockingIOError:
        ours = False
    if not ours:
        raise OutputError(f"{folder}: another shardkit is writing this split")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename_over_nothing(stage: Path, out: Path) -> None:
    """Rename, failing if `out` has appeared meanwhile.  Linux renameat2(2), or rename's own rule.

    Where the filesystem has no renameat2 (NFS), rename replaces at most an empty folder.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = os.fsencode(stage), os.fsencode(out)
        if renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in NO_RENAMEAT2:
            raise OSError(code, os.strerror(code))
    os.rename(stage, out)
