"""Publishes an output folder whole or not at all.

Everything is written to a stage folder beside the output, each file synced, and the stage renamed
over nothing in one step, or exchanged with the folder that it replaces.  A refused run writes
nothing, a failed one removes its stage, and a killed one leaves a stage that the next run to the
same output removes or, asked to, goes on with.

Each run's stage has a name of its own, and a stage left by another is renamed before it is touched:
what two runs write is never mixed, whether or not the filesystem has locks.
"""

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shardkit.errors import OutputError
from shardkit.output import atomic as folders
from shardkit.output.destination import Destination, as_output_error

JOURNAL = "journal.jsonl"  # in a stage only: how far its files have come


class StagingFolder:
    """An output being written."""

    def __init__(self, folder: Path) -> None:
        """`folder` is ours alone; it is empty, or holds what a stopped run has left."""
        self.folder = folder
        self._open: dict[str, int] = {}

    def create(self, name: str, size: int) -> int:
        """A new file of the stage, `size` bytes reserved on disk.  Raises OutputError."""
        fd = self._opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        if size:
            with as_output_error(self.folder / name):
                os.posix_fallocate(fd, 0, size)
        return fd

    def reopen(self, name: str) -> int:
        """A file that a stopped run has left, to be read and written on.  Raises OutputError."""
        return self._opened(name, os.O_RDWR | os.O_NONBLOCK)

    def _opened(self, name: str, flags: int) -> int:
        with as_output_error(self.folder / name):
            fd = os.open(self.folder / name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._open[name] = fd
        return fd

    def sync_file(self, name: str) -> None:
        """Sync and close a file, everything written.  Raises OutputError."""
        fd = self._open.pop(name)
        with as_output_error(self.folder / name):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_files(self, names: Collection[str]) -> None:
        """Finish several files, all at once.  Raises OutputError."""
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            list(pool.map(self.sync_file, names))

    def write(self, name: str, data: bytes) -> None:
        """A whole small file, synced.  Raises OutputError."""
        fd = self.create(name, 0)
        view = memoryview(data)
        with as_output_error(self.folder / name):
            while view:
                view = view[os.write(fd, view) :]
        self.sync_file(name)

    def clear(self, kept: Collection[str] = ()) -> None:
        """Close and remove every file but these.  Raises OutputError."""
        for name in self._open.keys() - set(kept):
            os.close(self._open.pop(name))
        with as_output_error(self.folder):
            for path in self.folder.iterdir():
                if path.name not in kept:
                    path.unlink()

    def close(self) -> None:
        """Close what is still open."""
        while self._open:
            os.close(self._open.popitem()[1])


@contextlib.contextmanager
def publish_folder(target: Destination) -> Iterator[StagingFolder]:
    """A stage that becomes the output when the block ends well, and is removed when it does not.

    Where it was to resume, it is kept if the run is interrupted or cannot write.  Raises
    OutputError if the output may not be made or replaced, or another run is writing it.
    """
    replaces = target.check()
    with as_output_error(target.out):
        folder, lock = _acquire_stage(target)
    stage = StagingFolder(folder)
    try:
        if replaces:
            _check_exchange(folder)
        yield stage
        stage.close()
        _publish_stage(target, folder)
    except BaseException as error:
        stage.close()
        stopped = isinstance(error, KeyboardInterrupt | OutputError)
        if not (target.resume and stopped and (folder / JOURNAL).exists()):
            folders.discard_folder(folder)
        raise
    finally:
        os.close(lock)


def _publish_stage(target: Destination, folder: Path) -> None:
    """The one step that makes the stage the output; then what it replaced, if anything, goes."""
    with as_output_error(target.out):
        (folder / JOURNAL).unlink(missing_ok=True)
        folders.sync_folder(folder)
        replaces = target.check_replaceable is not None and target.check()
        if replaces:
            folders.exchange_folders(folder, target.path)
        else:
            folders.rename_no_replace(folder, target.path)
        folders.sync_folder(target.parent)
    if replaces:
        with as_output_error(folder):
            folders.remove_folder(folder)


def _check_exchange(folder: Path) -> None:
    """Raise OutputError where nothing can be replaced in one step: before it is copied in vain."""
    with as_output_error(folder):
        if not folders.can_exchange(folder):
            raise OutputError(
                f"{folder.parent}: its filesystem cannot exchange two folders in one step, so"
                " nothing is replaced; remove the old output first, or write elsewhere"
            )


def _acquire_stage(target: Destination) -> tuple[Path, int]:
    """A stage of our own and its lock: a stopped run's, if it is to be gone on with, or a new one.

    All others that stopped runs have left are removed.  Raises OutputError.
    """
    taken: list[tuple[Path, int]] = []
    kept = None
    try:
        for left in target.find_stages():
            with as_output_error(left), contextlib.suppress(FileNotFoundError):  # others are faster
                taken.append(_take_over(left, target))
        if target.resume:
            kept = next((one for one in taken if (one[0] / JOURNAL).exists()), None)
        for one in taken:
            if one is not kept:
                with as_output_error(one[0]):
                    folders.remove_folder(one[0])
        kept = kept or _make_stage(target)
    finally:
        for one in taken:
            if one is not kept:
                os.close(one[1])
    return kept


def _take_over(left: Path, target: Destination) -> tuple[Path, int]:
    """Make a stopped run's stage our own by its name: if it should run after all, it fails."""
    lock = _lock_stage(left, target)
    stage = target.new_stage_path()
    try:
        left.rename(stage)
    except BaseException:
        os.close(lock)
        raise
    return stage, lock


def _make_stage(target: Destination) -> tuple[Path, int]:
    stage = target.new_stage_path()
    stage.mkdir()
    try:
        return stage, _lock_stage(stage, target)
    except BaseException:
        folders.discard_folder(stage)
        raise


def _lock_stage(folder: Path, target: Destination) -> int:
    """Lock a stage, where the filesystem has locks.  Raises OutputError if another run has it."""
    lock = folders.open_folder(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(f"{target.out}: another shardkit is writing it") from None
    except OSError:
        pass  # no locks here: names alone keep runs apart
    return lock
