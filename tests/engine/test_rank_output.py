"""What a rank writes can be read in the log, is bounded, and ends with its last line."""

import logging
import os

import pytest

from shardkit.runtime.engine.rank_output import LINE_BYTES, RankOutput


def test_each_line_is_logged_and_the_last_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shardkit")
    output = RankOutput(3)
    with output as fd:
        os.write(fd, b"a warning\n\n")
        os.write(fd, b"x" * (LINE_BYTES + 1) + b"\nValueError: b\xff\n")
    assert output.read_last_line(5) == "ValueError: b\N{REPLACEMENT CHARACTER}"
    output.close(5)
    assert [record.getMessage()[:17] for record in caplog.records] == [
        "rank 3: a warning", "rank 3: " + 9 * "x", "rank 3: x", "rank 3: ValueErro",
    ]  # fmt: skip


def test_a_rank_that_writes_nothing_has_no_last_line() -> None:
    output = RankOutput(0)
    assert output.read_last_line(0.05) == ""  # it still runs
    with output:
        pass
    assert output.read_last_line(5) == ""
