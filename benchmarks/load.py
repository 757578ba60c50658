"""Time and memory of a load, beside reading the same files into new memory.

    python -m benchmarks.load [--gib 2.1] [--tp 2] [--rounds 4] [--folder DIR] [--json]

Ranks are processes of their own, as torchrun starts them. Each first imports all that a load needs
and joins the others; then it loads its shard, reading or mapping it, or reads its file into a new
tensor of as many bytes, all ranks at once. All run in every round, each first in turn, on files in
the page cache and on files that have been dropped from it. Just before, as much memory as they take
is used and freed, as for `benchmarks.split`. The slowest rank counts. Memory is the peak (VmHWM)
over what was resident before, and bytes are what the process read meanwhile (/proc/PID/io), both
over the file's size.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama import modeling_llama  # noqa: F401 - a load would import it

from benchmarks.split import free_pages, make_source, warm
from shardkit.files import read_exactly
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.first_touch import MADV_HUGEPAGE, advise_kernel, find_huge_pages
from shardkit.runtime.load_options import LoadOptions
from shardkit.runtime.loader import load_with_warnings
from shardkit.timeouts import Timeouts

LOAD, MAP = "load", "load, mapped"
PLAIN, HUGE = "read into new memory", "the same with huge pages"
WAYS = (LOAD, MAP, PLAIN, HUGE)


def run_rank(way: str, folder: Path) -> dict[str, float]:
    """Load this rank's shard, or only read its file; what it took."""
    group = connect("cpu", Timeouts())
    path = sorted(folder.glob("rank-*.safetensors"))[group.tp_rank]
    size = path.stat().st_size
    torch.empty(1 << 20).zero_()
    resident, received = read_number("status", "VmRSS"), read_number("io", "rchar")
    print("ready", flush=True)
    sys.stdin.readline()
    group.all_agree({})
    start = time.perf_counter()
    if way in (LOAD, MAP):
        kept: Any = load_with_warnings(folder, group, LoadOptions(mmap=way == MAP))[0]
    else:
        kept = torch.empty(size, dtype=torch.uint8)
        if way == HUGE:
            first, last = find_huge_pages(kept)
            advise_kernel(first, last - first, MADV_HUGEPAGE)
        with path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), memoryview(kept.numpy()), 0)
    seconds = time.perf_counter() - start
    peak = (read_number("status", "VmHWM") - resident) * 1024
    used = {
        "seconds": seconds, "memory": peak / size,
        "bytes": (read_number("io", "rchar") - received) / size,
    }  # fmt: skip
    del kept
    group.leave()
    return used


def read_number(file: str, name: str) -> int:
    """A number of this process in /proc."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1])


def run_ranks(
    way: str, folder: Path, tp_size: int, prepare: Callable[[], None]
) -> dict[str, float]:
    """The largest of each number that any rank used, `prepare` called once all are ready to load.

    Raises CalledProcessError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(tp_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "benchmarks.load", "--rank", way, "--folder", str(folder)]
    ranks = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **common, "OMP_NUM_THREADS": "1", "RANK": str(rank),
                 "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(tp_size)
    ]  # fmt: skip
    for rank in ranks:
        assert rank.stdout is not None
        rank.stdout.readline()
    prepare()
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    outputs = [rank.communicate()[0] for rank in ranks]
    for rank in ranks:
        if rank.returncode:
            raise subprocess.CalledProcessError(rank.returncode, command)
    used = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(each[name] for each in used) for name in used[0]}


def drop(path: Path) -> None:
    """Have the file on disk alone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, gib: float, tp_size: int, rounds: int) -> dict[str, Any]:
    """Every way on warm and on cold files."""
    make_source(folder / "source", gib)
    shards = folder / "shards"
    split = [sys.executable, "-m", "shardkit", "split", str(folder / "source"), str(shards)]
    subprocess.run([*split, "--tp", str(tp_size)], check=True, stdout=subprocess.DEVNULL)
    results: dict[str, list[dict[str, float]]] = {}
    paths = list(shards.glob("*.safetensors"))
    size = 2 * sum(path.stat().st_size for path in paths)  # of weights, and of cold files
    for turn in range(rounds):
        for state, prepare in (("warm", warm), ("cold", drop)):
            for way in (*WAYS[turn % len(WAYS) :], *WAYS[: turn % len(WAYS)]):
                for path in paths:
                    prepare(path)
                used = run_ranks(way, shards, tp_size, partial(free_pages, folder, size))
                results.setdefault(f"{way}, {state}", []).append(used)
    report: dict[str, Any] = {"tp_size": tp_size, "rounds": rounds}
    for name, runs in results.items():
        baseline = results[f"{PLAIN}, {name.rpartition(', ')[2]}"]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, baseline, strict=True)]
        report[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        report[name] |= {"ratio": statistics.median(ratios), "worst": max(ratios)}
    return report


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.1)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="Work below this folder.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(run_rank(options.rank, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        report = measure(Path(scratch), options.gib, options.tp, options.rounds)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print("| | seconds | ratio to reading | memory over the file | bytes read over it |")
    print("|-|--------:|-----------------:|---------------------:|-------------------:|")
    for name, row in report.items():
        if isinstance(row, dict):
            print(
                f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f}, worst {row['worst']:.2f}"
                f" | {row['memory']:.3f} | {row['bytes']:.3f} |"
            )


if __name__ == "__main__":
    main()
