"""The journal of an unfinished output: read as strictly as it is written."""

import json

import pytest

from shardkit.output.resume import (
    JournalContents,
    JournalEntry,
    RunIdentity,
    parse_journal,
)
from shardkit.strict_json import JsonError, encode_canonical

HEX = "0123456789abcdef" * 4


FIRST = {"format": 1, "split_id": HEX, "source": HEX, "files": HEX}


LINE = {"file": "rank", "tensors": 3, "sha256": HEX}


HOSTILE: dict[str, list[object]] = {
    "format 2": [{**FIRST, "format": 2}],
    "an unknown key": [{**FIRST, "more": 1}],
    "a missing key": [{key: FIRST[key] for key in ("format", "split_id")}],
    "a short digest": [{**FIRST, "source": HEX[1:]}],
    "a list": [[1, 2]],
    "an entry first": [LINE],
    "a file outside": [FIRST, {**LINE, "file": "../rank"}],
    "no name": [FIRST, {**LINE, "file": ""}],
    "a fraction": [FIRST, {**LINE, "tensors": 1.5}],
    "less than none": [FIRST, {**LINE, "tensors": -1}],
    "true": [FIRST, {**LINE, "tensors": True}],
    "too many": [FIRST, {**LINE, "tensors": 1 << 40}],
    "a digest in capitals": [FIRST, {**LINE, "sha256": HEX.upper()}],
    "a first line again": [FIRST, FIRST],
}


@pytest.mark.parametrize("lines", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_journal_is_refused_before_its_last_line(lines: list[object]) -> None:
    data = b"".join(json.dumps(line).encode() + b"\n" for line in (*lines, LINE))
    with pytest.raises(JsonError):
        parse_journal(data)


def test_a_journal_reads_back_as_written() -> None:
    data = encode_canonical(FIRST) + b"\n" + encode_canonical(LINE) + b"\n"
    record = parse_journal(data)
    assert record == JournalContents(
        RunIdentity(HEX, HEX, HEX), (JournalEntry("rank", 3, HEX),), len(data)
    )
