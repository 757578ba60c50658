"""Time of split, merge, reshard and verify, beside a durable copy and beside hashing alone.

    python -m benchmarks.convert [--gib 2.1] [--tp 4] [--to 8] [--rounds 7] [--folder DIR] [--json]

Every round runs each command once, in an order of its own, as each leaves memory in its own state:
in a process of its own, on warm files and into a new folder, which is synced to disk within the
time and removed before the next.  Before each, as much memory as an output takes is used and freed,
and bytecode is kept, as for `benchmarks.split`.  Baselines
are of the same round: a durable copy (`cp -r`, then `sync -f`), and a floor, which a program that
takes these digests can hardly beat: the sha256 of as many bytes as the command has to hash, by
`openssl dgst` over the same shards, a process for each core, beside the durable copy if the command
writes.  A reshard has to hash twice: what it reads and what it writes.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.split import make_source, time_command, warm

SHARDKIT = [sys.executable, "-m", "shardkit"]
OUT = "{out}"  # where a command writes, if it writes
COPY, HASH, BOTH, TWICE = "durable copy", "hash", "copy, hash", "copy, hash twice"
COPY_SCRIPT = 'cp -r "$1" "$2" && sync -f "$2"'
HASH_SCRIPT = 'find "$3" -name "*.safetensors" | xargs -n 1 -P "$4" openssl dgst -sha256'
SCRIPTS = {
    COPY: COPY_SCRIPT,
    HASH: HASH_SCRIPT,
    BOTH: f"({HASH_SCRIPT}) & {COPY_SCRIPT}; wait",
    TWICE: f"({HASH_SCRIPT}; {HASH_SCRIPT}) & {COPY_SCRIPT}; wait",
}


def list_commands(folder: Path, tp_size: int, other: int) -> dict[str, tuple[list[str], str]]:
    """By name, a command and the baseline that is its floor."""
    source, shards = str(folder / "source"), str(folder / "shards")
    verify = [*SHARDKIT, "verify", shards]
    arguments = ["sh", source, OUT, shards, str(os.cpu_count() or 1)]
    return {
        **{name: (["sh", "-c", script, *arguments], name) for name, script in SCRIPTS.items()},
        "split": ([*SHARDKIT, "split", source, OUT, "--tp", str(tp_size)], BOTH),
        "merge": ([*SHARDKIT, "merge", shards, OUT], BOTH),
        "reshard": ([*SHARDKIT, "reshard", shards, OUT, "--tp", str(other)], TWICE),
        "verify, files": ([*verify, "--level", "files"], HASH),
        "verify, weights": ([*verify, "--against", source, "--level", "weights"], HASH),
    }


def measure(folder: Path, gib: float, tp_size: int, other: int, rounds: int) -> dict[str, Any]:
    """Every command's median seconds, its ratios to the copy and to its floor, and peak memory."""
    size = make_source(folder / "source", gib)
    split = [*SHARDKIT, "split", str(folder / "source"), str(folder / "shards")]
    subprocess.run([*split, "--tp", str(tp_size)], check=True, stdout=subprocess.DEVNULL)
    for path in (folder / "shards").glob("*.safetensors"):
        warm(path)
    commands = list_commands(folder, tp_size, other)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(commands), len(commands)):
            command, _ = commands[name]
            arguments = [part.replace(OUT, str(folder / "out")) for part in command]
            result = time_command(arguments, folder / "out", size)
            if turn:  # the first round warms the caches
                results[name].append(result)
    seconds = {name: [took for took, _ in runs] for name, runs in results.items()}
    report = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "to_copy": describe_ratios(seconds[name], seconds[COPY]),
            "to_floor": describe_ratios(seconds[name], seconds[floor]),
            "peak_mb": max(peak for _, peak in results[name]),
        }
        for name, (_, floor) in commands.items()
    }
    return {"bytes": size, "tp_size": tp_size, "other": other, "rounds": rounds, "results": report}


def describe_ratios(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Ratios to the baseline of the same round: the median, and the worst."""
    ratios = [took / base for took, base in zip(times, baseline, strict=True)]
    return {"median": statistics.median(ratios), "worst": max(ratios)}


def format_ratio(ratio: dict[str, float]) -> str:
    """`1.05, worst 1.10`."""
    return f"{ratio['median']:.2f}, worst {ratio['worst']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.1)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--to", type=int, default=8, help="What to reshard to.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Work below this folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = measure(Path(folder), options.gib, options.tp, options.to, options.rounds)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['bytes'] / 2**30:.2f} GiB, tp {report['tp_size']} to {report['other']},")
    print(f"{os.cpu_count()} cores, medians of {report['rounds']} rounds after one of warming\n")
    print("| | seconds | ratio to the copy | ratio to the floor | peak memory, MB |")
    print("|-|--------:|------------------:|-------------------:|----------------:|")
    for name, row in report["results"].items():
        ratios = f"{format_ratio(row['to_copy'])} | {format_ratio(row['to_floor'])}"
        print(f"| {name} | {row['seconds']:.2f} | {ratios} | {row['peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
