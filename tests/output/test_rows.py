"""Rows that lie in parts in several buffers: any ranges of them, in the order of the rows."""

import random
from collections.abc import Callable, Sequence

import pytest

from shardkit.layout import Span
from shardkit.output import rows
from shardkit.output.rows import RowPart, cut_rows, pack_rows

COUNT, WIDTH = 5, 24


def place_rows(data: bytes, cuts: Sequence[int], ranks: Sequence[int]) -> list[RowPart]:
    """Rows cut at `cuts`, the parts of each stored by `ranks`, after those that they have."""
    bounds = list(zip([0, *cuts], [*cuts, WIDTH], strict=True))
    stored: dict[int, bytearray] = {rank: bytearray() for rank in ranks}
    for row in range(COUNT):
        for (start, stop), rank in zip(bounds, ranks, strict=True):
            stored[rank] += data[row * WIDTH + start : row * WIDTH + stop]
    views = {rank: memoryview(buffer) for rank, buffer in stored.items()}
    used, parts = dict.fromkeys(ranks, 0), []
    for (start, stop), rank in zip(bounds, ranks, strict=True):
        first = used[rank]
        used[rank] += stop - start
        parts.append(RowPart(views[rank], len(views[rank]) // COUNT, first, used[rank]))
    return parts


@pytest.fixture
def pieces_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets how many bytes are joined at once, and how many are packed in a piece."""

    def choose(joined: int, packed: int) -> None:
        monkeypatch.setattr(rows, "JOINED_BYTES", joined)
        monkeypatch.setattr(rows, "_find_room", lambda: memoryview(bytearray(packed)))

    return choose


@pytest.mark.parametrize(("joined", "packed"), [(1, 1), (30, 30), (30, 70), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_rows_are_packed_in_order(
    seed: int, joined: int, packed: int, pieces_of: Callable[[int, int], None]
) -> None:
    pieces_of(joined, packed)
    choice = random.Random(seed)
    data = choice.randbytes(COUNT * WIDTH)
    cuts = sorted(choice.sample(range(1, WIDTH), 3))
    parts = place_rows(data, cuts, [choice.randrange(3) for _ in range(4)])
    edges = sorted(choice.sample(range(WIDTH + 1), 4))
    spans = [Span(*edges[2:]), Span(*edges[:2]), Span(*edges[1:3]), Span(*edges[1:3])]
    expected = b"".join(data[r * WIDTH + a : r * WIDTH + b] for r in range(COUNT) for a, b in spans)
    packed_rows = b""
    for piece in pack_rows(cut_rows(parts, spans), COUNT):
        packed_rows += piece
        assert not piece.readonly
    assert packed_rows == expected


def test_small_parts_are_packed_together_and_large_ones_are_not_copied(
    pieces_of: Callable[[int, int], None],
) -> None:
    buffer = bytearray(range(COUNT * WIDTH))
    parts = [RowPart(memoryview(buffer), WIDTH, 0, WIDTH)]
    half = cut_rows(parts, [Span(0, 6), Span(6, 12)])
    assert len(half) == 1, "neighbors are one part"
    pieces_of(12, 2 * 12)
    assert [len(piece) for piece in pack_rows(half, COUNT)] == [24, 24, 12]
    pieces_of(11, 2 * 12)
    pieces = list(pack_rows(half, COUNT))
    assert [len(piece) for piece in pieces] == [12] * COUNT
    assert all(piece.obj is buffer for piece in pieces)


def test_a_piece_has_room_for_a_row_that_is_packed() -> None:
    assert rows.JOINED_BYTES <= rows.PACKED_BYTES


def test_rows_of_nothing_are_nothing() -> None:
    parts = [RowPart(memoryview(bytearray(8)), 4, 0, 4)]
    assert b"".join(pack_rows(cut_rows(parts, []), 0)) == b""
    assert b"".join(pack_rows(cut_rows(parts, []), 2)) == b""
