"""A short soak: every answer right, every refusal as it should be, and nothing that grows."""

import argparse
from pathlib import Path

import pytest

from tests.serve.soak import run_soak

SPARE = {"memory": 40, "descriptors": 4, "sockets": 4, "threads": 4}  # that come and go


@pytest.mark.slow
def test_mixed_load_gets_right_answers_and_leaves_nothing(stories260k: Path) -> None:
    options = argparse.Namespace(seconds=60.0, clients=8, seed=3)
    report = run_soak(stories260k, options)
    assert report["wrong"] == []
    assert report["outcomes"].keys() >= {"whole", "streamed", "left", "cancelled", "malformed"}
    early, late = report["after warming up"], report["at the end"]
    assert {name for name in late if late[name] > early[name] + SPARE.get(name, 0)} == set()
    assert (report["left"], report["tracebacks"]) == (0, 0)
