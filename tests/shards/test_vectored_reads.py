"""Reads into several views at once: each byte in its place, however few a read returns."""

import os
from pathlib import Path

import pytest

from shardkit.files import ShortRead, read_views
from shardkit.shards.integrity import split_evenly


@pytest.mark.parametrize("most", [1, 5, 7, 100])
def test_views_are_filled_however_few_bytes_a_read_returns(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(40)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    preadv = os.preadv

    def read_some(fd: int, views: list[memoryview], offset: int) -> int:
        some, room = [], most
        for view in views:
            some.append(view[:room])
            room -= len(some[-1])
        return preadv(fd, some, offset)

    monkeypatch.setattr(os, "preadv", read_some)
    buffers = [bytearray(size) for size in (0, 7, 1, 0, 5, 20, 0)]
    read_views(fd, map(memoryview, buffers), 3)
    assert b"".join(buffers) == data[3:36]
    with pytest.raises(ShortRead, match="became shorter than byte 43"):
        read_views(fd, map(memoryview, buffers), 10)
    os.close(fd)


def test_more_views_are_filled_than_one_read_can_fill(tmp_path: Path) -> None:
    data = os.urandom(2500)
    (tmp_path / "file").write_bytes(data)
    buffer = memoryview(bytearray(2500))
    with (tmp_path / "file").open("rb") as file:
        read_views(file.fileno(), (buffer[at : at + 1] for at in range(2500)), 0)
    assert bytes(buffer) == data


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_views_are_split_into_parts_of_about_as_many_bytes(count: int) -> None:
    views = [memoryview(bytes([size] * size)) for size in (0, 5, 1, 0, 7, 4)]
    parts = split_evenly(views, count)
    sizes = [sum(map(len, part)) for part in parts]
    assert b"".join(bytes(view) for part in parts for view in part) == b"".join(map(bytes, views))
    assert len(parts) == count
    assert max(sizes) == -(-17 // count)
