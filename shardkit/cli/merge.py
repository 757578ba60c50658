"""`shardkit merge`."""

from pathlib import Path
from time import perf_counter

import click

from shardkit.cli.options import FOLDER, FORCE, JSON, RESUME, progress_bar
from shardkit.cli.output import format_bytes, format_count, print_json, print_line
from shardkit.convert.split import merge_shards as write_merge
from shardkit.planning.summary import count_stored_bytes, count_total_bytes, group_by_layout
from shardkit.shards.reader import ShardedCheckpoint


@click.command()
@click.argument("shards", type=FOLDER)
@click.argument("out", type=FOLDER)
@FORCE
@RESUME
@JSON
def merge(shards: Path, out: Path, force: bool, resume: bool, as_json: bool) -> None:
    """Write the unsharded checkpoint again.

    SHARDS is a shard folder; every byte of it is checked before anything is written.  OUT is the
    new folder, with the source's own files, names and metadata.  --force replaces a folder that
    holds only files of those names.

    \b
    Example:
      shardkit merge llama-tp4 llama-again
    """
    with ShardedCheckpoint(shards) as opened:
        plan, files = opened.manifest.plan, opened.manifest.source.files
        total = count_total_bytes(plan)
        started = perf_counter()
        checked = sum(count_stored_bytes(group_by_layout(plan), plan.tp_size))
        with progress_bar(checked + total, "merge") as advance:
            write_merge(opened, out, advance, force=force, resume=resume)
        seconds = perf_counter() - started
    if as_json:
        names = [file.name for file in files]
        print_json({"out": str(out), "files": names, "bytes": total, "seconds": round(seconds, 3)})
        return
    print_line(
        f"Wrote {out}: {format_count(len(files), 'weights file')}, {format_bytes(total)} in {seconds:.1f} s"
        f" ({total / seconds / 1e9:.2f} GB/s)"
    )
