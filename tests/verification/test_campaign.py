"""The campaign's own trials, one of each kind here; all of them in `make campaign`."""

import time
from pathlib import Path

import pytest

from tests.verification.campaign import (
    Trial,
    list_layout_mutants,
    list_right,
    list_spread,
    list_wrong,
    run_campaign,
    run_trial,
)


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_a_wrong_layout_is_caught_and_a_right_one_passes(name: str) -> None:
    mutant = list_layout_mutants(name)[0]
    trial = Trial(name, "float16", 3, mutant.fault, mutant.pattern)
    assert run_trial(trial, mutant.recipe) == "failed"
    assert run_trial(Trial(name, "float16", 3), None) == "passed"


def test_trials_of_a_report_are_not_run_again(tmp_path: Path) -> None:
    report, deadline = tmp_path / "report.jsonl", time.monotonic() + 100
    trials = [(Trial("llama", "float32", seed), None) for seed in range(2)]
    assert run_campaign(iter(trials[:1]), report, deadline) == {"passed": 1}
    assert run_campaign(iter(trials), report, deadline) == {"passed": 2}
    assert run_campaign(iter(trials), report, 0) == {"passed": 2}
    assert len(report.read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.timeout(0)  # it has a deadline of its own
def test_every_wrong_layout_in_16_bits_is_caught(tmp_path: Path) -> None:
    assert len({(mutant.fault, mutant.pattern) for _, mutant in list_spread()}) >= 40
    counts = run_campaign(list_wrong(1), tmp_path / "report.jsonl", time.monotonic() + 7200)
    assert counts["passed"] == 0


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_right_split_is_called_wrong(tmp_path: Path) -> None:
    counts = run_campaign(list_right(500), tmp_path / "report.jsonl", time.monotonic() + 7200)
    assert counts == {"passed": 500}
