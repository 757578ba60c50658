"""`shardkit merge`."""

from pathlib import Path
from time import perf_counter

import click

from shardkit.cli.options import FOLDER, FORCE, JSON, MAX_MEMORY, RESUME, progress_bar
from shardkit.cli.output import format_count, format_rate, print_json, print_line
from shardkit.convert import merge as merge_folder


@click.command()
@click.argument("shards", type=FOLDER)
@click.argument("out", type=FOLDER)
@FORCE
@RESUME
@MAX_MEMORY
@JSON
def merge(
    shards: Path, out: Path, force: bool, resume: bool, max_memory: int | None, as_json: bool
) -> None:
    """Write the unsharded checkpoint again.

    SHARDS is a shard folder. All of its data is checked before OUT is there. OUT is the new
    folder, with the source's own files, names and metadata. --force replaces a folder that holds
    only files of those names.

    \b
    Example:
      shardkit merge llama-tp4 llama-again
    """
    started = perf_counter()
    with progress_bar("merge") as progress:
        result = merge_folder(
            shards, out, force=force, resume=resume, max_memory=max_memory, progress=progress
        )
    seconds = perf_counter() - started
    if as_json:
        print_json(
            {
                "out": str(out),
                "files": list(result.files),
                "bytes": result.nbytes,
                "seconds": round(seconds, 3),
            }
        )
        return
    files = format_count(len(result.files), "weights file")
    print_line(f"Wrote {out}: {files}, {format_rate(result.nbytes, seconds)}")
