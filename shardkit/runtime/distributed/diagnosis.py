"""From what ranks report to one sentence: how they differ, which one failed, and why."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from shardkit.errors import RanksError, RanksLost

SAME_SOFTWARE = "every rank must run the same versions"
SAME_FOLDER = "every rank must load the same shard folder"
SAME_INPUTS = "every rank must receive the same inputs"
ADVICE = {
    "world size": "start every rank with the same WORLD_SIZE",
    "shardkit": SAME_SOFTWARE,
    "torch": SAME_SOFTWARE,
    "transformers": SAME_SOFTWARE,
    "manifest": SAME_FOLDER,
    "split": SAME_FOLDER,
    "call": "every rank must make the same call",
    "inputs": SAME_INPUTS,
    "input values": SAME_INPUTS,
}
CLOSED = ("closed", "reset", "Broken pipe", "shut down")
REPORT_BYTES = 4096  # at most, so that reports can be exchanged by one collective
DIGEST_LENGTH = 64  # hex digits of a sha256


@dataclass(frozen=True, slots=True)
class RankState:
    """What is known of another rank once a collective has failed.

    Attributes:
        failed: The collective that failed on it, too.
        departure: Why it left the group, as the end of a sentence about it.
        alive: Whether it gave a heartbeat.
        status: What it said that it was doing in its last heartbeat.
    """

    failed: str | None = None
    departure: str | None = None
    alive: bool = False
    status: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a rank gave no result.

    Attributes:
        reason: In one line.
        lost: Whether the rank can no longer be used.
        ended: Whether its process has ended.
    """

    reason: str
    lost: bool = True
    ended: bool = False


def encode_report(report: Mapping[str, str], error: str, note: str) -> str:
    """A report as JSON of at most REPORT_BYTES; error and note are cut if need be."""
    while True:
        text = json.dumps({"report": dict(report), "error": error, "note": note})
        if len(text) <= REPORT_BYTES or not (error or note):
            return text
        error, note = error[: len(error) // 2], note[: len(note) // 2]


def find_difference(reports: Mapping[int, Mapping[str, str]]) -> str:
    """The first thing that ranks report differently, and which ranks are in the minority; or "".

    Between groups of equal size, the one of the lowest rank counts as the majority.
    """
    reports = dict(sorted(reports.items()))
    for key in dict.fromkeys(key for report in reports.values() for key in report):
        values = {rank: report.get(key, "none") for rank, report in reports.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        minority = {rank: value for rank, value in values.items() if value != usual}
        if minority:
            named = ", ".join(f"rank {r} has {key} {_shorten(v)}" for r, v in minority.items())
            majority = [rank for rank, value in values.items() if value == usual]
            advice = ADVICE.get(key, "every rank must load the same")
            return f"{named}, {rank_list(majority)} {_shorten(usual)}: {advice}"
    return ""


def list_errors(errors: Mapping[int, str]) -> str:
    """The errors of ranks, each once with the first rank that has it; or ""."""
    first: dict[str, int] = {}
    for rank, error in sorted(errors.items()):
        if error:
            first.setdefault(error, rank)
    return "; ".join(f"rank {rank}: {error}" for error, rank in first.items())


def explain_failure(
    collective: str, error: str, limit: float, others: Mapping[int, RankState]
) -> str:
    """Why a collective failed: a rank left, or else died, or else is late or out of step.

    Args:
        collective: What this rank was in, such as `all_reduce #12`.
        error: What its library says.
        limit: The seconds that a collective may take.
        others: What is known of every other rank.
    """
    absent = {rank: state for rank, state in others.items() if state.failed is None}
    present = {rank: state for rank, state in absent.items() if state.departure is None}
    silent = [rank for rank, state in present.items() if not state.alive]
    causes = [f"rank {r} {s.departure}" for r, s in absent.items() if s.departure is not None]
    if silent:
        closed = any(word in error for word in CLOSED)
        causes.append(f"{rank_list(silent)} died" if closed else name_silent(silent))
    if causes:
        return f"{'; '.join(causes)} (this rank was in {collective})"
    if late := [f"{rank_list([rank])} ({state.status})" for rank, state in present.items()]:
        return f"{', '.join(late)} did not reach {collective} within {limit:g} s"
    elsewhere = [f"rank {r} was in {s.failed}" for r, s in others.items() if s.failed != collective]
    if elsewhere:
        return f"{', '.join(elsewhere)} while this rank was in {collective}: they are out of step"
    return f"every rank failed in {collective}: {error}"


def first_sentence(error: Exception) -> str:
    """The first sentence of a library's error, without its place in the source; never empty."""
    line = str(error).split("\n")[0] or type(error).__name__
    return re.sub(r"^\[\S+\] ", "", line).split(". ")[0]


def combine_faults(faults: Mapping[int, Fault], size: int) -> RanksError:
    """The error that gives the cause: processes that ended, else errors of ranks that still run.

    What ranks say of a failed collective comes last: it is a consequence.
    """
    ended = [fault.reason for fault in faults.values() if fault.ended]
    errors = {rank: fault.reason for rank, fault in faults.items() if not fault.lost}
    if ended:
        return RanksLost("; ".join(ended))
    if errors:
        first = min(errors)
        reason = errors[first]
        shared = len(errors) == size and len(set(errors.values())) == 1
        return RanksError(
            reason if shared or reason.startswith("rank ") else f"rank {first}: {reason}"
        )
    return RanksLost("; ".join(dict.fromkeys(fault.reason for fault in faults.values())))


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks in words: `rank 1`, `ranks 0, 2`."""
    numbers = sorted(ranks)
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def name_silent(ranks: Collection[int]) -> str:
    """What is known of ranks that give no heartbeat: `rank 1 died or is stopped: ...`."""
    be = "is" if len(ranks) == 1 else "are"
    return f"{rank_list(ranks)} died or {be} stopped: no sign of life"


def _shorten(value: str) -> str:
    """A value, or the beginning of a digest."""
    return value[:12] if len(value) == DIGEST_LENGTH else value
