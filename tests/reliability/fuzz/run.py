"""Fuzz the readers, and report what was run.

    python -m tests.reliability.fuzz.run header --seconds 60    one reader
    python -m tests.reliability.fuzz.run --all --core-hours 2   each reader for its share
    python -m tests.reliability.fuzz.run --report               write RESULTS.md from all results

The readers are those of `targets.py`.  Every slice of a run adds a line to `--results` (JSON
lines), so that a run that is cut short is counted for what it did; `--report` adds them up.  What
coverage grows by is kept in `--work`, and so is an input that a reader fails on, which ends its
target's run, and makes the exit code 1.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.reliability.fuzz.targets import SEEDS, TARGETS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
REPORT = HERE / "RESULTS.md"
FUZZER = "tests.reliability.fuzz.fuzzer"
SLICE = 600
LIMITS = ("-timeout=30", "-rss_limit_mb=2048", "-print_final_stats=1")


@dataclass(frozen=True)
class Result:
    """One run of one target: seconds of wall clock and of CPU, edges covered, failing inputs."""

    target: str
    executions: int
    seconds: float
    cpu_seconds: float
    coverage: int
    crashes: int
    commit: str


def fuzz(name: str, seconds: float, work: Path) -> Result:
    """Fuzz a target in a process of its own for `seconds`; what it found new stays in `work`."""
    found, crashes = work / name, work / "crashes"
    for folder in (found, crashes, SEEDS / name):
        folder.mkdir(parents=True, exist_ok=True)
    before, start = _cpu_seconds(), time.monotonic()
    kept = set(crashes.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", FUZZER, name, *LIMITS, f"-max_total_time={int(seconds)}",
         f"-artifact_prefix={crashes}/{name}-", found, SEEDS / name],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace",
        env=_environment(), check=False,
    )  # fmt: skip
    new = set(crashes.iterdir()) - kept
    if done.returncode or new:
        print(done.stderr[-4000:], file=sys.stderr)
    return Result(
        name,
        _last(r"^#(\d+)\t|stat::number_of_executed_units: (\d+)", done.stderr),
        round(time.monotonic() - start, 1),
        round(_cpu_seconds() - before, 1),
        _last(r" cov: (\d+) ", done.stderr),
        len(new) or int(done.returncode != 0),
        _commit(),
    )


def runs(names: list[str], seconds: float, cpu: bool, work: Path) -> Iterator[Result]:
    """Fuzz each target for its share of `seconds`, of CPU or of wall clock, in turns."""
    total, most = (
        sum(TARGETS[n].share for n in names),
        max(target.share for target in TARGETS.values()),
    )
    left = {name: seconds * TARGETS[name].share / total for name in names}
    while names := [name for name in names if left[name] >= 1]:
        for name in names:
            turn = min(SLICE * TARGETS[name].share / most, left[name])
            result = fuzz(name, turn, work)
            left[name] -= result.cpu_seconds if cpu else turn
            if result.crashes:
                left[name] = 0
            yield result


def report(results: Path) -> str:
    """The results of every target added up, as a table."""
    lines = results.read_text().splitlines() if results.exists() else []
    found = [Result(**json.loads(line)) for line in lines]
    rows = [_row(name, [r for r in found if r.target == name]) for name in TARGETS]
    every = _row("all", found)
    head = (
        "# Fuzzing\n\n"
        "Written by `python -m tests.reliability.fuzz.run --report`; seconds are of CPU.\n\n"
        "| reader | executions | seconds | executions/s | edges covered | failures |\n"
        "|---|---|---|---|---|---|\n"
    )
    commits = ", ".join(sorted({r.commit for r in found}))
    failed = "A failure ends its run; the input is kept in the corpus, and has to pass since."
    return head + "".join([*rows, every]) + f"\n{failed}\n\nCommits: {commits or 'none'}.\n"


def _row(name: str, results: list[Result]) -> str:
    executions = sum(r.executions for r in results)
    seconds = sum(r.cpu_seconds for r in results)
    crashes = sum(r.crashes for r in results)
    coverage = "" if name == "all" else str(max((r.coverage for r in results), default=0))
    rate = executions / seconds if seconds else 0
    return f"| {name} | {executions:,} | {seconds:,.0f} | {rate:,.0f} | {coverage} | {crashes} |\n"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def _last(pattern: str, text: str) -> int:
    found = [*re.finditer(pattern, text, re.MULTILINE)]
    return int(found[-1][found[-1].lastindex or 0]) if found else 0


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--seconds", type=float, help="of wall clock, of all targets together (60)")
    parser.add_argument("--core-hours", type=float, help="of CPU, instead")
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"), help="what is found")
    parser.add_argument("--results", type=Path, help="JSON lines (WORK/results.jsonl)")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name}")
    options = parser.parse_args()
    names = list(TARGETS) if options.all else options.targets
    if not names and not options.report:
        parser.error("name a target, or give --all or --report")
    if wrong := set(names) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(wrong))}")
    results = options.results or options.work / "results.jsonl"
    seconds = options.core_hours * 3600 if options.core_hours else options.seconds or 60
    crashes = 0
    for result in runs(names, seconds, bool(options.core_hours), options.work):
        crashes += result.crashes
        print(
            f"{result.target}: {result.executions:,} executions in {result.seconds:.0f} s"
            f" ({result.cpu_seconds:.0f} s of CPU), {result.coverage} edges,"
            f" {result.crashes} failures", flush=True,
        )  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
    if options.report:
        REPORT.write_text(report(results))
    return int(crashes > 0)


if __name__ == "__main__":
    sys.exit(main())
