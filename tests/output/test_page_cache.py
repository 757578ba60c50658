"""What is written stays in the page cache if it fits, and does not take its place if not."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from shardkit.output import resume, writer
from shardkit.output.writer import CACHED_BYTES, FileWriter
from tests.helpers.split_helpers import split_folder

CHUNK = 4 << 20


def count_cached_bytes(path: Path) -> int:
    """The bytes of a file that the page cache has, by mincore(2)."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        pages = -(-size // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        code = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
        assert code == 0, os.strerror(ctypes.get_errno())
        return sum(flag & 1 for flag in resident) * mmap.PAGESIZE


def write_file(path: Path, size: int, keeps_pages: bool) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        file = FileWriter(fd, size, lambda *_: None, keeps_pages=keeps_pages)
        for at in range(0, size, CHUNK):
            file.write([memoryview(at.to_bytes(8, "little") * (CHUNK // 8))])
    finally:
        os.close(fd)


def test_a_large_output_keeps_no_more_than_its_last_bytes_in_memory(tmp_path: Path) -> None:
    if not has_page_cache(tmp_path):
        pytest.skip(f"{tmp_path} is in memory: no page of it can be dropped")
    size = 4 * CACHED_BYTES
    for keeps_pages in (True, False):
        write_file(tmp_path / f"{keeps_pages}", size, keeps_pages)
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
    write_file(tmp_path / "again", size, keeps_pages=False)
    assert count_cached_bytes(tmp_path / "True") == size
    assert count_cached_bytes(tmp_path / "again") <= 2 * CACHED_BYTES + CHUNK


def has_page_cache(folder: Path) -> bool:
    """Whether the folder is on a disk."""
    path = folder / "probe"
    path.write_bytes(bytes(CHUNK))
    with path.open("rb") as file:  # not as the package does it, which may be wrong
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, CHUNK, os.POSIX_FADV_DONTNEED)
    return count_cached_bytes(path) == 0


def test_a_failure_to_write_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        ctypes.set_errno(5)
        return -1

    monkeypatch.setattr(writer, "_sync_file_range", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "file", 3 * CACHED_BYTES, keeps_pages=False)


@pytest.mark.parametrize("keeps_pages", [False, True])
def test_a_split_drops_what_memory_has_no_room_for(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch, keeps_pages: bool
) -> None:
    answers: list[tuple[int, bool]] = []
    files: list[bool] = []

    def answer(nbytes: int) -> bool:
        answers.append((nbytes, keeps_pages))
        return keeps_pages

    class WatchedWriter(FileWriter):
        def __init__(self, *arguments: object) -> None:
            files.append(bool(arguments[4]))
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(resume, "fits_page_cache", answer)
    monkeypatch.setattr(resume, "FileWriter", WatchedWriter)
    split_folder(stories260k, tmp_path / "out", 2)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert answers == [(written, keeps_pages)]
    assert files == [keeps_pages] * 2
