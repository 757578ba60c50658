"""What `split` and `reshard` say when they are done."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardkit.cli.output import (
    format_count,
    format_rate,
    print_json,
    print_line,
    print_warning,
)
from shardkit.cli.plan_bytes import plan_bytes_to_json, print_plan_bytes
from shardkit.convert import SplitResult
from shardkit.planning import summarize_plan
from shardkit.shards import Manifest


def show_split(
    result: SplitResult,
    seconds: float,
    as_json: bool,
    source: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Print a finished split or reshard, its warnings on stderr, and the commands to type next."""
    for warning in result.warnings:
        print_warning(warning)
    assert result.manifest is not None
    commands = suggest_commands(
        result.out, result.plan.tp_size, source, result.generates_text, allow_pickle
    )
    if as_json:
        print_json(split_to_json(result.manifest, result.out, seconds, commands))
        return
    total = sum(rank_file.digest.size for rank_file in result.manifest.ranks)
    ranks = format_count(result.plan.tp_size, "rank")
    print_line(f"Wrote {result.out}: {ranks}, {format_rate(total, seconds)}")
    print_plan_bytes(summarize_plan(result.plan))
    print_line()
    print_line("Next:")
    for command in commands:
        print_line(f"  {command}")


def split_to_json(
    manifest: Manifest, out: Path, seconds: float, commands: Sequence[str]
) -> dict[str, Any]:
    """A finished split as JSON values."""
    total = sum(rank_file.digest.size for rank_file in manifest.ranks)
    return {
        "out": str(out),
        "split_id": manifest.split_id,
        "recipe": manifest.recipe,
        "bytes_written": total,
        "seconds": round(seconds, 3),
        "gb_per_second": round(total / seconds / 1e9, 3),
        "files": [
            {"name": file.name, "size": file.digest.size, "sha256": file.digest.sha256}
            for file in manifest.ranks
        ],
        "nonfinite": manifest.nonfinite,
        **plan_bytes_to_json(summarize_plan(manifest.plan)),
        "next": list(commands),
    }


def suggest_commands(
    out: Path, tp_size: int, source: str | None, generates_text: bool, allow_pickle: bool = False
) -> list[str]:
    """What to type after a split: verify it, try it, serve it."""
    folder = shlex.quote(str(out))
    against = f" --against {shlex.quote(source)}" if source else ""
    against += " --allow-pickle" if allow_pickle else ""
    commands = [f"shardkit verify {folder}{against}"]
    if generates_text:
        commands.append(f'shardkit generate {folder} "Once upon a time"')
    return [*commands, f"torchrun --nproc-per-node {tp_size} your_server.py"]
