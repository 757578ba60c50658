"""What Linux says to have of a file in memory."""

import mmap
import os
from pathlib import Path

import pytest

from shardkit.shards import page_cache
from shardkit.shards.page_cache import count_cached_bytes

SIZE = 64 * mmap.PAGESIZE


def test_pages_are_counted_as_they_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(SIZE))
    with (tmp_path / "file").open("rb") as file:
        fd = file.fileno()
        os.fsync(fd)
        if not count_cached_bytes(fd, 0, SIZE):
            pytest.skip("this kernel does not say what it has cached (Linux 6.5)")
        assert count_cached_bytes(fd, 0, SIZE) == count_cached_bytes(fd, 0, 0) == SIZE
        assert count_cached_bytes(fd, SIZE // 2, SIZE) == SIZE // 2
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if count_cached_bytes(fd, 0, 0) == SIZE:
            pytest.skip("this filesystem is memory, and drops nothing")
        assert count_cached_bytes(fd, 0, SIZE) == 0
        assert os.pread(fd, 1, 0)
        assert count_cached_bytes(fd, 0, mmap.PAGESIZE) == mmap.PAGESIZE


def test_an_older_kernel_says_that_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with (tmp_path / "file").open("rb") as file:
        monkeypatch.setattr(page_cache, "CACHESTAT", 99999)  # a call that no kernel has
        assert count_cached_bytes(file.fileno(), 0, SIZE) == 0
        monkeypatch.setattr(page_cache, "_syscall", None)
        assert count_cached_bytes(file.fileno(), 0, SIZE) == 0
