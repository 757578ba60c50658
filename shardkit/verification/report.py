"""What was checked and what was found, as values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

Verdict = Literal["passed", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class Check:
    """One level's verdict, one line about it, its faults, and its measured numbers."""

    name: str
    verdict: Verdict
    summary: str
    faults: tuple[str, ...] = ()
    numbers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """Every level, in order.  A level that was not run proves nothing, and is said to be so."""

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and something passed."""
        verdicts = [check.verdict for check in self.checks]
        return "failed" not in verdicts and "passed" in verdicts

    def to_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return {
            "folder": self.folder,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }
