"""`shardkit reshard`."""

from pathlib import Path
from time import perf_counter

import click

from shardkit.cli.options import FOLDER, FORCE, JSON, MAX_MEMORY, RESUME, TP, progress_bar
from shardkit.cli.split_output import show_split
from shardkit.convert import reshard as reshard_folder


@click.command()
@click.argument("shards", type=FOLDER)
@click.argument("out", type=FOLDER)
@TP
@FORCE
@RESUME
@MAX_MEMORY
@JSON
def reshard(
    shards: Path,
    out: Path,
    tp_size: int,
    force: bool,
    resume: bool,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Split shards for another number of ranks.

    SHARDS is a shard folder. All of its data is checked before OUT is there. OUT is the new
    shard folder, byte for byte what a split of the source writes. With --force it may replace
    SHARDS itself.

    \b
    Example:
      shardkit reshard llama-tp4 llama-tp8 --tp 8
    """
    started = perf_counter()
    with progress_bar("reshard") as progress:
        result = reshard_folder(
            shards,
            out,
            tp_size,
            force=force,
            resume=resume,
            max_memory=max_memory,
            progress=progress,
        )
    show_split(result, perf_counter() - started, as_json)
