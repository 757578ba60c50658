"""Counts the bytes that are read of files."""

import os
from collections import Counter
from collections.abc import Sequence

import pytest


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The bytes that are read from now on into given memory, by the file's name."""
    counts: Counter[str] = Counter()
    plain = os.preadv

    def count_and_read(fd: int, views: Sequence[memoryview], offset: int) -> int:
        counts[os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))] += sum(map(len, views))
        return plain(fd, views, offset)

    monkeypatch.setattr(os, "preadv", count_and_read)
    return counts
