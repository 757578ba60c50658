"""Publishes an output folder whole or not at all.

Everything is written to a stage folder beside the output, each file synced, and the stage renamed
over nothing in one step, or exchanged with the folder that it replaces. A refused run writes
nothing, a failed one removes its stage, and a killed one leaves a stage that the next run to the
same output removes or, with `--resume`, resumes.

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
from shardkit.files import write_all
from shardkit.output import atomic
from shardkit.output.destination import Destination, as_output_error

JOURNAL = "journal.jsonl"  # in a staging folder only: how far its files have come


class StagingFolder:
    """An output being written."""

    def __init__(self, folder: Path) -> None:
        """`folder` is this run's alone; it is empty, or holds what an interrupted run left."""
        self.folder = folder
        self._open: dict[str, int] = {}

    def create(self, name: str, size: int) -> int:
        """A new file of the stage, `size` bytes reserved on disk. Raises OutputError."""
        fd = self._open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        if size:
            with as_output_error(self.folder / name):
                os.posix_fallocate(fd, 0, size)
        return fd

    def reopen(self, name: str) -> int:
        """A file that an interrupted run left, to be read and continued. Raises OutputError."""
        return self._open_file(name, os.O_RDWR | os.O_NONBLOCK)

    def _open_file(self, name: str, flags: int) -> int:
        with as_output_error(self.folder / name):
            fd = os.open(self.folder / name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._open[name] = fd
        return fd

    def sync_file(self, name: str) -> None:
        """Sync and close a file, everything written. Raises OutputError."""
        fd = self._open.pop(name)
        with as_output_error(self.folder / name):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_files(self, names: Collection[str]) -> None:
        """Sync and close several files at once. Raises OutputError."""
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            list(pool.map(self.sync_file, names))

    def write(self, name: str, data: bytes) -> None:
        """A whole small file, synced. Raises OutputError."""
        fd = self.create(name, 0)
        with as_output_error(self.folder / name):
            write_all(fd, data)
        self.sync_file(name)

    def clear(self, kept: Collection[str] = ()) -> None:
        """Close and remove every file but these. Raises OutputError."""
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
def publish_folder(destination: Destination) -> Iterator[StagingFolder]:
    """A staging folder that becomes the output if the block succeeds, and is removed if it fails.

    With `--resume` it is kept if the run is interrupted or cannot write.

    Raises:
        OutputError: If the output may not be made or replaced, or another run is writing it.
    """
    replaces = destination.check()
    with as_output_error(destination.out):
        folder, lock = _acquire_stage(destination)
    stage = StagingFolder(folder)
    try:
        if replaces:
            _check_exchange(folder)
        yield stage
        stage.close()
        _publish_stage(destination, folder)
    except BaseException as error:
        stage.close()
        stopped = isinstance(error, KeyboardInterrupt | OutputError)
        if not (destination.resume and stopped and (folder / JOURNAL).exists()):
            atomic.discard_folder(folder)
        raise
    finally:
        os.close(lock)


def _publish_stage(destination: Destination, folder: Path) -> None:
    """The one step that makes the stage the output; then what it replaced, if anything, goes."""
    with as_output_error(destination.out):
        (folder / JOURNAL).unlink(missing_ok=True)
        atomic.sync_folder(folder)
        replaces = destination.check_replaceable is not None and destination.check()
        if replaces:
            atomic.exchange_folders(folder, destination.path)
        else:
            atomic.rename_no_replace(folder, destination.path)
        atomic.sync_folder(destination.parent)
    if replaces:
        with as_output_error(folder):
            atomic.remove_folder(folder)


def _check_exchange(folder: Path) -> None:
    """Raise OutputError, before anything is copied, if nothing can be replaced in one step."""
    with as_output_error(folder):
        if not atomic.can_exchange(folder):
            raise OutputError(
                f"{folder.parent}: --force needs a filesystem with atomic rename-exchange; remove"
                " the old output first, or write elsewhere"
            )


def _acquire_stage(destination: Destination) -> tuple[Path, int]:
    """A staging folder of this run's own, and its lock: an interrupted run's, or a new one.

    All others that interrupted runs left are removed. Raises OutputError.
    """
    taken: list[tuple[Path, int]] = []
    kept = None
    try:
        for leftover in destination.find_stages():
            # It is gone if another run removed it meanwhile.
            with as_output_error(leftover), contextlib.suppress(FileNotFoundError):
                taken.append(_take_over(leftover, destination))
        if destination.resume:
            kept = next((one for one in taken if (one[0] / JOURNAL).exists()), None)
        for one in taken:
            if one is not kept:
                with as_output_error(one[0]):
                    atomic.remove_folder(one[0])
        kept = kept or _make_stage(destination)
    finally:
        for one in taken:
            if one is not kept:
                os.close(one[1])
    return kept


def _take_over(leftover: Path, destination: Destination) -> tuple[Path, int]:
    """Rename an interrupted run's stage: if that run is alive after all, it fails."""
    lock = _lock_stage(leftover, destination)
    stage = destination.new_stage_path()
    try:
        leftover.rename(stage)
    except BaseException:
        os.close(lock)
        raise
    return stage, lock


def _make_stage(destination: Destination) -> tuple[Path, int]:
    stage = destination.new_stage_path()
    stage.mkdir()
    try:
        return stage, _lock_stage(stage, destination)
    except BaseException:
        atomic.discard_folder(stage)
        raise


def _lock_stage(folder: Path, destination: Destination) -> int:
    """Lock a stage with flock(2), if the filesystem has locks.

    Raises OutputError if another run has it.
    """
    lock = atomic.open_folder(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(f"{destination.out}: another shardkit is writing it") from None
    except OSError:
        pass  # no locks here: unique names alone keep runs apart
    return lock
