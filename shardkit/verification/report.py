"""What was checked, and the result, as values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

SCHEMA = 1  # of the JSON: raised when a field changes its meaning or goes; new fields may come
Verdict = Literal["passed", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one level.

    Attributes:
        name: The level: "files", "weights" or "numerics"; "sums" for its rounded sums.
        verdict: "passed", "failed" or "not run".
        summary: One line about it.
        faults: One line for each fault.
        numbers: What was measured, as JSON values by name.
    """

    name: str
    verdict: Verdict
    summary: str
    faults: tuple[str, ...] = ()
    numbers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a verification.

    A level that was not run proves nothing, and is reported as such.

    Attributes:
        folder: The shard folder.
        checks: The levels that were asked for, in order.
        split: The split, its digests and layout, as JSON values; empty if there is no manifest.
        versions: With what it was run, by name.
        command: The command line, if there was one.
    """

    folder: str
    checks: tuple[Check, ...]
    split: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def passed(self) -> bool:
        """Whether no level failed, and at least one passed."""
        verdicts = [check.verdict for check in self.checks]
        return "failed" not in verdicts and "passed" in verdicts

    def to_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return {
            "schema": SCHEMA,
            "folder": self.folder,
            "passed": self.passed,
            "checks": [replace_infinite(asdict(check)) for check in self.checks],
            "split": dict(self.split),
            "versions": dict(self.versions),
            "command": self.command,
        }


def replace_infinite(value: Any) -> Any:
    """A JSON value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: replace_infinite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_infinite(item) for item in value]
    return value
