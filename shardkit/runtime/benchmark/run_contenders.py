"""Runs contenders in turns, each round in processes of its own, and sums the rounds up."""

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardkit import __version__
from shardkit.errors import RanksError
from shardkit.runtime.benchmark.contenders import Contender, Workload
from shardkit.runtime.distributed.cores import count_cores

WORKER = "shardkit.runtime.benchmark.worker"
LIMIT = 3600.0  # seconds for one round of one contender
GRACE = 10.0  # seconds that torchrun has to end its ranks

Round = list[dict[str, Any]]
"""What each rank has measured, by rank."""


def run_contenders(
    contenders: Sequence[Contender],
    workload: Workload,
    rounds: int,
    note: Callable[[str], object] = lambda _line: None,
) -> dict[str, Any]:
    """Run every contender once a round, one after another.

    Args:
        contenders: The baseline first.
        workload: What each of them runs.
        rounds: How often.
        note: Called with what runs next.

    Returns:
        The report, as JSON has it: `machine`, `workload`, `rounds`, and `contenders` with the
        median, least and most of each measurement; seconds and bytes, of the slowest and the
        largest rank.

    Raises:
        RanksError: If a contender fails; the message names it and says why.
    """
    results: dict[Contender, list[Round]] = {contender: [] for contender in contenders}
    for turn in range(1, rounds + 1):
        for contender in contenders:
            note(f"round {turn} of {rounds}: {contender.name}")
            results[contender].append(_run_round(contender, workload))
    return {
        "machine": describe_machine(),
        "workload": workload.to_json(),
        "rounds": rounds,
        "contenders": [_summarize(contender, results[contender]) for contender in contenders],
    }


def describe_machine() -> dict[str, Any]:
    """The processor, its cores, and the versions of what runs on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    libraries = {library: version(library) for library in ("torch", "transformers")}
    return {"processor": name, "cores": count_cores(), "shardkit": __version__, **libraries}


def _run_round(contender: Contender, workload: Workload) -> Round:
    job = {**asdict(contender), "folder": str(contender.folder), "workload": workload.to_json()}
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        command = [sys.executable]
        if contender.ranks > 1:
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(contender.ranks)]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command += ["-m", WORKER, scratch, json.dumps(job)]
        threads = max(1, count_cores() // contender.ranks)
        output = _run_command(command, {**os.environ, "OMP_NUM_THREADS": str(threads)})
        paths = [Path(scratch, f"rank-{rank}.json") for rank in range(contender.ranks)]
        ranks = [json.loads(path.read_text()) for path in paths if path.exists()]
    errors = [rank["error"] for rank in ranks if "error" in rank]
    if errors or len(ranks) < contender.ranks:
        last = output.strip().splitlines()[-1:] or ["its processes ended without a word"]
        raise RanksError(f"{contender.name}: {(errors or last)[0]}")
    return ranks


def _run_command(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run a command and return what it says on stderr; it does not outlive this function."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            return process.communicate(timeout=LIMIT)[1]
        except BaseException:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=GRACE)
            process.kill()
            raise


def _summarize(contender: Contender, rounds: Sequence[Round]) -> dict[str, Any]:
    """A contender's measurements over the rounds."""
    names = ("load_seconds", "read_bytes", "memory_bytes")
    summary: dict[str, Any] = {
        "name": contender.name,
        "kind": contender.kind,
        "ranks": contender.ranks,
        **{
            name: _measure_spread([[rank[name] for rank in each] for each in rounds])
            for name in names
        },
    }
    runs = []
    for at, first in enumerate(rounds[0][0]["runs"]):
        values = {name: [[rank["runs"][at][name] for rank in each] for each in rounds]
                  for name in first if name != "batch"}  # fmt: skip
        spreads = {name: _measure_spread(each) for name, each in values.items()}
        runs.append({"batch": first["batch"], **spreads})
    return {**summary, "runs": runs}


def _measure_spread(rounds: Sequence[Sequence[float | None]]) -> dict[str, float] | None:
    """The spread of each round's largest value; None if a rank has none."""
    values = [[value for value in each if value is not None] for each in rounds]
    if any(len(known) < len(each) for known, each in zip(values, rounds, strict=True)):
        return None
    most = [max(each) for each in values]
    return {"median": statistics.median(most), "least": min(most), "most": max(most)}
