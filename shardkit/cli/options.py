"""Options that several commands share, and the opening of what they name."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import click

from shardkit.checkpoint import Checkpoint
from shardkit.checkpoint.pickled.convert import open_source as open_checkpoint_source
from shardkit.errors import CheckpointError
from shardkit.shards.manifest import MANIFEST_NAME

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Option = Callable[[Decorated], Decorated]

FOLDER = click.Path(path_type=Path)
TP = click.option(
    "--tp", "tp_size", type=click.IntRange(min=1), required=True, metavar="N",
    help="The number of ranks to divide the model over.",
)  # fmt: skip
RECIPE = click.option(
    "--recipe", metavar="NAME|FILE.toml",
    help="Use this recipe instead of the one that serves the config's model_type.",
)  # fmt: skip
REVISION = click.option(
    "--revision", metavar="REV",
    help="Read this branch, tag or commit of a Hub repository.",
)  # fmt: skip
FORCE = click.option(
    "--force", is_flag=True,
    help="Replace the output that is there, in one step, if it is one that shardkit wrote.",
)  # fmt: skip
RESUME = click.option(
    "--resume", is_flag=True,
    help="Go on with what a stopped run has left, and keep it if this one is stopped.",
)  # fmt: skip
ALLOW_PICKLE = click.option(
    "--allow-pickle", is_flag=True,
    help="Read pickled .bin weights where there are no others: converted by a process apart, which"
    " takes as much room in TMPDIR as they have.",
)  # fmt: skip
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)


@contextmanager
def open_source(
    source: str, revision: str | None, allow_pickle: bool = False
) -> Iterator[Checkpoint]:
    """Open an unsharded checkpoint, a folder or a Hub id.  Raises CheckpointError."""
    if (Path(source) / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"{source}: is a shard folder already; use `shardkit reshard` or `shardkit merge`"
        )
    with open_checkpoint_source(source, revision, allow_pickle) as checkpoint:
        yield checkpoint


@contextmanager
def progress_bar(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr if that is a terminal; the threads of a copy may all advance it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm  # costs more than many a plan, and nobody would see it

    lock = Lock()
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done and for how long, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as line:
        yield line.set_description_str
