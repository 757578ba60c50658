"""What was checked, and the result, as values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

Verdict = Literal["passed", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one level.

    Attributes:
        name: The level: "files", "weights" or "numerics".
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
    """

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no level failed, and at least one passed."""
        verdicts = [check.verdict for check in self.checks]
        return "failed" not in verdicts and "passed" in verdicts

    def to_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return {
            "folder": self.folder,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }
