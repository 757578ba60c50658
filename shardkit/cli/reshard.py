"""`shardkit reshard`."""

from pathlib import Path
from time import perf_counter

import click

from shardkit.checkpoint.weight_files import read_config
from shardkit.cli.options import FOLDER, FORCE, JSON, RESUME, TP, progress_bar
from shardkit.cli.output import print_json
from shardkit.cli.report import print_split, split_to_json, suggest_commands
from shardkit.convert.split import reshard_shards as write_reshard
from shardkit.planning.costs import generates_text
from shardkit.planning.plan import Plan
from shardkit.planning.summary import count_stored_bytes, group_by_layout
from shardkit.shards.reader import ShardedCheckpoint


@click.command()
@click.argument("shards", type=FOLDER)
@click.argument("out", type=FOLDER)
@TP
@FORCE
@RESUME
@JSON
def reshard(
    shards: Path, out: Path, tp_size: int, force: bool, resume: bool, as_json: bool
) -> None:
    """Cut shards for another number of ranks.

    SHARDS is a shard folder; every byte of it is checked before anything is written.  OUT is the
    new shard folder, byte for byte what a split of the source writes.  With --force it may replace
    SHARDS itself.

    \b
    Example:
      shardkit reshard llama-tp4 llama-tp8 --tp 8
    """
    with ShardedCheckpoint(shards) as opened:
        old = opened.manifest.plan
        texts = generates_text(old, read_config(shards))
        total = _stored(old) + _stored(old.with_tp_size(tp_size))
        started = perf_counter()
        with progress_bar(total, "reshard") as advance:
            manifest = write_reshard(opened, tp_size, out, advance, force=force, resume=resume)
        seconds = perf_counter() - started
    commands = suggest_commands(out, tp_size, None, texts)
    if as_json:
        print_json(split_to_json(manifest, out, seconds, commands))
    else:
        print_split(manifest, out, seconds, commands)


def _stored(plan: Plan) -> int:
    return sum(count_stored_bytes(group_by_layout(plan), plan.tp_size))
