"""Blocks of whose outputs each rank has a part of its own."""

from pathlib import Path

from tests.verification.test_blocks import split_sample


def test_what_ranks_have_parts_of_is_rounded_on_neither_side(tmp_path: Path) -> None:
    """Two layers after each other, in pieces: a rank has a part of what the first outputs."""
    found = split_sample("fun_asr_nano", tmp_path, 2, "float16").check()
    assert found.verdict == "passed", found.faults
