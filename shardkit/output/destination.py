"""Where an output goes: whether it may, and whether there is room."""

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import OutputError

STAT_BLOCK = 512  # bytes that st_blocks counts in, stat(2)
SLACK = 1.01  # room for what is small: companion files, the manifest, the filesystem's own


@contextlib.contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turn an OSError about an output into an OutputError of one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from None


@dataclass(frozen=True, slots=True)
class Destination:
    """A destination that may not exist yet.

    Attributes:
        out: Where the output goes.
        check_replaceable: Raises OutputError if a folder that is there may not be replaced; None
            if none may.
        resume: Resume an interrupted run; keep the partial output if interrupted again.
    """

    out: Path
    check_replaceable: Callable[[Path], object] | None = None
    resume: bool = False

    @property
    def path(self) -> Path:
        """The output's own name, even if `out` is a dot."""
        return self.out.absolute()

    @property
    def parent(self) -> Path:
        """The folder that the output is in, and its stage."""
        return self.path.parent

    def check(self) -> bool:
        """Whether a folder is there to be replaced.

        Raises OutputError if one is there that may not be, or if none can be made.
        """
        with as_output_error(self.out):
            there = os.path.lexists(self.out)
            if there:
                self._check_old()
            if not self.parent.is_dir():
                raise OutputError(f"{self.parent}: no such folder to write {self.out.name} in")
            if not os.access(self.parent, os.W_OK | os.X_OK):
                raise OutputError(f"{self.parent}: not writable")
        return there

    def _check_old(self) -> None:
        if self.check_replaceable is None:
            raise OutputError(
                f"{self.out}: exists, and is replaced only with --force; name another, or remove it"
            )
        if self.out.is_symlink() or not self.out.is_dir():
            raise OutputError(
                f"{self.out}: is not a folder, so --force does not replace it; name another"
            )
        if self.path.name in ("", ".."):
            raise OutputError(f"{self.out}: cannot be replaced by this name; name the folder")
        self.check_replaceable(self.out)

    def check_space(self, nbytes: int) -> None:
        """Raise OutputError unless there is room for `nbytes` and 1 % more.

        What interrupted runs left counts as room: it is resumed, or removed.
        """
        with as_output_error(self.out):
            usage = os.statvfs(self.parent)
            free = usage.f_bavail * usage.f_frsize + sum(
                map(_count_stage_bytes, self.find_stages())
            )
        if free < nbytes * SLACK:
            raise OutputError(
                f"{self.out}: needs {nbytes * SLACK / 1e9:.2f} GB, and its filesystem has"
                f" {free / 1e9:.2f} GB free; make room, or write elsewhere"
            )

    def new_stage_path(self) -> Path:
        """A name that no other run has."""
        return self.parent / f".{self.path.name}.shardkit-stage-{secrets.token_hex(4)}"

    def find_stages(self) -> list[Path]:
        """The stages that runs to this output have, or have left."""
        name = re.escape(self.path.name)
        own = re.compile(rf"\.{name}\.shardkit-stage-[0-9a-f]{{8}}")
        return sorted(path for path in self.parent.iterdir() if own.fullmatch(path.name))


def _count_stage_bytes(stage: Path) -> int:
    """The bytes on disk of a stage's files; none once another run has removed it."""
    with contextlib.suppress(FileNotFoundError):
        return sum(path.lstat().st_blocks * STAT_BLOCK for path in stage.iterdir())
    return 0
