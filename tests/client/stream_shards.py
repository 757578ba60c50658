"""Split a checkpoint, verify the shards, and stream text from them.

Usage: python stream_shards.py SOURCE OUT TP_SIZE PROMPT
"""

import sys

import shardkit
from shardkit.errors import ShardkitError


def make_shards(source: str, out: str, tp_size: int) -> None:
    """Split `source` into `out`; exit unless the shards compute what the source computes."""
    report = shardkit.plan(source, tp_size)
    print(f"{max(report.summary.loaded_bytes):,} bytes on the largest of {tp_size} ranks")
    shardkit.split(source, out, tp_size)
    result = shardkit.verify(out, source)
    if result is None or not result.passed:
        raise SystemExit(f"{out}: not verified against {source}")


def stream_text(out: str, prompt: str) -> None:
    """Start the ranks, and print what they generate as it comes."""
    with shardkit.launch(out) as engine:
        for text in engine.stream(prompt, max_new_tokens=32):
            print(text, end="", flush=True)


if __name__ == "__main__":
    try:
        make_shards(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        stream_text(sys.argv[2], sys.argv[4])
    except ShardkitError as error:
        sys.exit(f"{error}")
