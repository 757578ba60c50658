"""Damage to a finished split, undone when the test is done with it."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shardkit.shards.manifest import Manifest

PAGE = 4096
SECTOR = 512


def quiet(_: int) -> None:
    """No progress bar."""


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def modify(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")


def shorten(path: Path) -> None:
    os.truncate(path, 900)


@contextmanager
def written(path: Path, at: int, data: bytes) -> Iterator[None]:
    """Other bytes in a file, for a while."""
    fd = os.open(path, os.O_RDWR)
    before = os.pread(fd, len(data), at)
    assert before != data
    assert len(before) == len(data)
    try:
        os.pwrite(fd, data, at)
        yield
    finally:
        os.pwrite(fd, before, at)
        os.close(fd)


@dataclass(frozen=True)
class Split:
    """A finished split, and what its sound files hold."""

    folder: Path
    manifest: Manifest

    def path(self, tp_rank: int) -> Path:
        return self.folder / self.manifest.ranks[tp_rank].name

    @cached_property
    def sound(self) -> list[bytes]:
        return [self.path(rank).read_bytes() for rank in range(self.manifest.tp_size)]

    @cached_property
    def headers(self) -> list[int]:
        """The length of each file's header."""
        return [
            len(self.manifest.rank_header(self.manifest.mesh.rank(r)))
            for r in range(self.manifest.tp_size)
        ]

    def named(self, tp_rank: int, at: int) -> str:
        """What a report must say of damage that begins at byte `at` of a rank's file."""
        if at < self.headers[tp_rank]:
            return f"; its header differs at byte {at}"
        pieces = self.manifest.ranks[tp_rank].pieces
        held = {name: piece.offset for name, piece in pieces.items() if piece.offset <= at}
        last = max(held.values())
        stop = min([p.offset for p in pieces.values() if p.offset > last], default=None)
        stop = self.manifest.ranks[tp_rank].digest.size if stop is None else stop
        (name,) = (name for name, offset in held.items() if offset == last)
        return f"rank {tp_rank}: {name}: damaged between byte {last} and {stop};"

    def flipped(self, tp_rank: int, bit: int) -> tuple[int, bytes]:
        """A byte's place, and the byte with one bit of it flipped."""
        at = bit // 8
        return at, bytes([self.sound[tp_rank][at] ^ 1 << bit % 8])

    def bits(self, count: int, seed: int) -> Iterator[tuple[int, int]]:
        """Ranks and random bits of their files' data."""
        chance = random.Random(seed)
        for _ in range(count):
            tp_rank = chance.randrange(self.manifest.tp_size)
            yield tp_rank, chance.randrange(8 * self.headers[tp_rank], 8 * len(self.sound[tp_rank]))

    def pages(self, count: int, seed: int) -> Iterator[tuple[int, int, bytes]]:
        """Ranks, places and bytes: a page of zeros, or two pages of a file in each other's place.

        A page that was zeros, or is swapped for its equal, is no damage, and is not counted.
        """
        chance = random.Random(seed)
        while count:
            tp_rank = chance.randrange(self.manifest.tp_size)
            sound = self.sound[tp_rank]
            starts = range(0, len(sound) - PAGE, SECTOR)
            one, two = sorted(chance.sample(starts, 2))
            if chance.random() < 0.5:
                at, data = one, bytes(PAGE)
            elif two - one >= PAGE:
                middle = sound[one + PAGE : two]
                at, data = one, sound[two : two + PAGE] + middle + sound[one : one + PAGE]
            else:
                continue
            if data != sound[at : at + len(data)]:
                count -= 1
                yield tp_rank, at, data


def flip(path: Path, at: int) -> None:
    """One bit of a file; a negative place is counted from its end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
