"""What is run and interrupted: each command on a folder of small sources, shards and outputs.

A scene is the command's arguments, what is at its output before (`old`, or nothing) and what is
there after it (`new`).  Its folder is made once and copied for every fault.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.split_helpers import merge_folder, reshard_folder, split_folder
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    specs_of,
    write_source,
)

Contents = dict[str, bytes] | None
TWO_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Scene:
    """`prepare` fills a folder; `stopped` is how the run that is to be resumed was begun."""

    name: str
    arguments: tuple[str, ...]
    prepare: Callable[[Path], object]
    out: str = "out"
    stopped: tuple[str, ...] = ()

    def command(self, folder: Path, more: tuple[str, ...] = ()) -> list[str]:
        """The arguments, their paths made `folder`'s."""
        return [part.replace("@", f"{folder}/") for part in (*self.arguments, *more)]


def state(folder: Path) -> Contents:
    """What an output folder holds; None where there is none."""
    return contents(folder) if folder.is_dir() else None


def source(folder: Path, name: str = "source") -> None:
    write_source(folder / name, llama_config(), specs_of(llama()), lambda at: TWO_FILES[at > 6])


def other_source(folder: Path) -> None:
    """The same names, files and sizes; every byte of the weights differs."""
    source(folder, "other")
    for name in TWO_FILES:
        path = folder / "other" / name
        data = path.read_bytes()
        base = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:base] + bytes(byte ^ 255 for byte in data[base:]))


def shards(folder: Path) -> None:
    source(folder)
    split_folder(folder / "source", folder / "shards", 2)
    shutil.rmtree(folder / "source")


def old_shards(folder: Path) -> None:
    """An output of the same names that holds other weights."""
    other_source(folder)
    split_folder(folder / "other", folder / "out", 2)
    shutil.rmtree(folder / "other")


def old_merge(folder: Path) -> None:
    old_shards(folder)
    (folder / "out").rename(folder / "before")
    merge_folder(folder / "before", folder / "out")
    shutil.rmtree(folder / "before")


def old_reshard(folder: Path) -> None:
    old_shards(folder)
    (folder / "out").rename(folder / "before")
    reshard_folder(folder / "before", folder / "out", 3)
    shutil.rmtree(folder / "before")


def both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for step in steps:
            step(folder)

    return prepare


SPLIT = ("split", "@source", "@out", "--tp", "2")
MERGE = ("merge", "@shards", "@out")
RESHARD = ("reshard", "@shards", "@out", "--tp", "3")
SCENES = [
    Scene("split", SPLIT, source),
    Scene("split over 4", ("split", "@source", "@out", "--tp", "4"), source),
    Scene("merge", MERGE, shards),
    Scene("reshard", RESHARD, shards),
    Scene("split --force", (*SPLIT, "--force"), both(source, old_shards)),
    Scene("merge --force", (*MERGE, "--force"), both(shards, old_merge)),
    Scene("reshard --force", (*RESHARD, "--force"), both(shards, old_reshard)),
    Scene(
        "reshard --force in place",
        ("reshard", "@shards", "@shards", "--tp", "3", "--force"), shards, "shards",
    ),
    Scene("split --resume", (*SPLIT, "--resume"), source, stopped=SPLIT),
    Scene("merge --resume", (*MERGE, "--resume"), shards, stopped=MERGE),
    Scene("reshard --resume", (*RESHARD, "--resume"), shards, stopped=RESHARD),
    Scene(
        "split --force --resume", (*SPLIT, "--force", "--resume"), both(source, old_shards),
        stopped=(*SPLIT, "--force"),
    ),
]  # fmt: skip
