"""What ranks have told each other, judged: how they differ, and which one is to blame."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardkit.errors import RanksError, RanksLost

SAME_SOFTWARE = "every rank must run the same versions"
SAME_FOLDER = "every rank must load the same shard folder"
ADVICE = {
    "world size": "start every rank with the same WORLD_SIZE",
    "shardkit": SAME_SOFTWARE,
    "torch": SAME_SOFTWARE,
    "transformers": SAME_SOFTWARE,
    "manifest": SAME_FOLDER,
    "split": SAME_FOLDER,
    "call": "every rank must be asked the same",
    "inputs": "every rank must be given the same inputs",
    "input values": "every rank must be given the same inputs",
}
CLOSED = ("closed", "reset", "Broken pipe", "shut down")


@dataclass(frozen=True, slots=True)
class State:
    """What is known of another rank once a collective has failed."""

    failed: str | None = None  # the collective that failed for it, too
    left: str | None = None  # why it ended, in its own words
    alive: bool = False  # it is heard of
    doing: str = ""  # what it said it does, when last heard of


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a rank gives no answer: in words, whether it is lost, and whether it has ended."""

    told: str
    lost: bool = True
    ended: bool = False


def differences(reports: Mapping[int, Mapping[str, str]]) -> str:
    """The first thing ranks report differently, naming those that most others contradict; or "".

    Between equally many, those that are like the lowest rank are taken for the usual.
    """
    reports = dict(sorted(reports.items()))
    for key in dict.fromkeys(key for report in reports.values() for key in report):
        values = {rank: report.get(key, "none") for rank, report in reports.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        odd = {rank: value for rank, value in values.items() if value != usual}
        if odd:
            told = ", ".join(f"rank {r} has {key} {_short(v)}" for r, v in odd.items())
            rest = [rank for rank, value in values.items() if value == usual]
            advice = ADVICE.get(key, "every rank must load it alike")
            return f"{told}, {named(rest)} {_short(usual)}: {advice}"
    return ""


def errors(found: Mapping[int, str]) -> str:
    """What ranks could not do, each cause once with the first rank that has it; or ""."""
    first: dict[str, int] = {}
    for rank, error in sorted(found.items()):
        if error:
            first.setdefault(error, rank)
    return "; ".join(f"rank {rank}: {error}" for error, rank in first.items())


def blame(doing: str, error: str, limit: float, others: Mapping[int, State]) -> str:
    """Why a collective failed, naming the rank: one that left, else is silent, late or elsewhere.

    `doing` is this rank's collective, `error` what its library said, `limit` its seconds.
    """
    away = {rank: state for rank, state in others.items() if state.failed is None}
    left = [f"rank {r} left: {s.left}" for r, s in away.items() if s.left is not None]
    silent = [r for r, s in away.items() if s.left is None and not s.alive]
    late = [f"{named([r])} ({s.doing})" for r, s in away.items() if s.left is None and s.alive]
    if silent:
        closed = any(word in error for word in CLOSED)
        left.append(
            f"{named(silent)} {'died' if closed else 'died or is stopped: no sign of life'}"
        )
    if left:
        return f"{'; '.join(left)} (this rank was in {doing})"
    if late:
        return f"{', '.join(late)} did not come to {doing} within {limit:g} s"
    elsewhere = [f"rank {r} was in {s.failed}" for r, s in others.items() if s.failed != doing]
    if elsewhere:
        return f"{', '.join(elsewhere)} while this one was in {doing}: the ranks are out of step"
    return f"the ranks lost each other in {doing}: {error}"


def brief(error: Exception) -> str:
    """The first sentence of a library's error, without the place in its source; never empty."""
    line = str(error).split("\n")[0] or type(error).__name__
    return re.sub(r"^\[\S+\] ", "", line).split(". ")[0]


def judged(faults: Mapping[int, Fault], size: int) -> RanksError:
    """The error that says why: deaths, else what is a rank's own, else what ranks say of others.

    Ranks that are left tell that a collective failed, and whom they miss.
    """
    ended = [fault.told for fault in faults.values() if fault.ended]
    own = {rank: fault.told for rank, fault in faults.items() if not fault.lost}
    if ended:
        return RanksLost("; ".join(ended))
    if own:
        first = min(own)
        told = own[first]
        alike = len(own) == size and len(set(own.values())) == 1
        return RanksError(told if alike or told.startswith("rank ") else f"rank {first}: {told}")
    return RanksLost("; ".join(dict.fromkeys(fault.told for fault in faults.values())))


def named(ranks: Iterable[int]) -> str:
    """Ranks in words: `rank 1`, `ranks 0, 2`."""
    listed = sorted(ranks)
    return f"rank{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"


def _short(value: str) -> str:
    """A value, or the beginning of a digest."""
    return value[:12] if len(value) == 64 else value
