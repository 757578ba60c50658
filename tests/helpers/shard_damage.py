"""Damage to one rank's folder of shards, and what its rank says of it."""

import shutil
from pathlib import Path

from tests.helpers.damage import flip


def rank_file(folder: Path, world: int, rank: int) -> Path:
    return folder / f"rank-{rank:05}-of-{world:05}.safetensors"


def missing(folder: Path, world: int, _other: Path) -> None:
    rank_file(folder, world, world - 1).unlink()


def truncated(folder: Path, world: int, _other: Path) -> None:
    path = rank_file(folder, world, world - 1)
    path.write_bytes(path.read_bytes()[:-1])


def swapped(folder: Path, world: int, _other: Path) -> None:
    last, first = rank_file(folder, world, world - 1), rank_file(folder, world, 0)
    last.write_bytes(first.read_bytes())


def of_another_split(folder: Path, world: int, other: Path) -> None:
    rank_file(folder, world, world - 1).write_bytes(rank_file(other, world, world - 1).read_bytes())


def flipped_header(folder: Path, world: int, _other: Path) -> None:
    flip(rank_file(folder, world, world - 1), 20)


def flipped_data(folder: Path, world: int, _other: Path) -> None:
    flip(rank_file(folder, world, world - 1), -3)


def flipped_manifest(folder: Path, _world: int, _other: Path) -> None:
    path = folder / "manifest.json"
    flip(path, path.stat().st_size // 2)


def another_config(folder: Path, _world: int, _other: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 60', '"vocab_size": 61'))


def another_manifest(folder: Path, _world: int, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


FILE = r"rank {r}: .*rank-\d+-of-\d+.safetensors"

DAMAGES = {
    missing: FILE + ".*missing", truncated: FILE, swapped: FILE + ".*rank '0', renamed",
    of_another_split: FILE + ".*of another split", flipped_header: FILE,
    flipped_manifest: r"rank {r}: .*manifest.json", another_config: r"rank {r}: .*config.json",
    another_manifest: r"rank {r} has manifest [0-9a-f]{{12}}",
}  # fmt: skip
