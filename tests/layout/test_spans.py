"""Spans: every small case, so that no head count meets an untried path."""

import itertools
from typing import Any

import pytest

from shardkit.errors import LayoutError
from shardkit.layout.spans import (
    MAX_SPANS,
    Section,
    held_units,
    kv_head_mode,
    partition,
    rank_spans,
)
from shardkit.layout.stretches import Span, Tile, coalesce, cover_axis, num_indices

SIZES = range(1, 13)


def sharings(units: int) -> list[tuple[int, int]]:
    """Every number of sharers and of ranks that `units` are tried with."""
    most = 8 * units
    return [
        (sharers, tp_size)
        for sharers in range(units, most, units)
        for tp_size in range(1, min(sharers, 12) + 1)
    ]


def indices(parts: tuple[Span, ...]) -> list[int]:
    return [index for start, stop in parts for index in range(start, stop)]


def units_of_ranks(units: int, sharers: int, tp_size: int) -> list[list[int]]:
    section = Section(units, 1, shared_by=sharers)
    return [indices(held_units(section, rank, tp_size)) for rank in range(tp_size)]


def test_units_are_dealt_out_evenly_and_in_order_with_the_first_ranks_one_more() -> None:
    for units in range(1, 40):
        for tp_size in range(1, units + 1):
            hands = [partition(units, rank, tp_size) for rank in range(tp_size)]
            assert [unit for hand in hands for unit in hand] == list(range(units))
            sizes = [len(hand) for hand in hands]
            assert sizes == sorted(sizes, reverse=True)
            assert max(sizes) - min(sizes) <= 1


def test_nine_heads_over_two_ranks_are_five_and_four() -> None:
    assert [len(partition(9, rank, 2)) for rank in range(2)] == [5, 4]


def test_a_rank_without_a_unit_is_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(LayoutError, match=r"4 units .* tp_size 5; possible: 1 to 4"):
        partition(4, 0, 5)


@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_unshared_spans_cover_every_index_exactly_once(repeat: int) -> None:
    for units, size in itertools.product(SIZES, (1, 2, 3)):
        for tp_size in range(1, units + 1):
            section = Section(units, size, repeat)
            found = [i for r in range(tp_size) for i in indices(rank_spans([section], r, tp_size))]
            assert sorted(found) == list(range(len(section)))


def test_each_block_of_a_repeated_section_is_divided_alike() -> None:
    # GPT-2's [Q | K | V] of 5 heads of 2 over 2 ranks: heads 0 to 2, and 3 to 4, of each.
    section = Section(5, 2, repeat=3)
    assert rank_spans([section], 0, 2) == ((0, 6), (10, 16), (20, 26))
    assert rank_spans([section], 1, 2) == ((6, 10), (16, 20), (26, 30))


@pytest.mark.parametrize("units", range(1, 7))
def test_every_query_head_finds_its_kv_head_in_the_place_attention_looks(units: int) -> None:
    for sharers, tp_size in sharings(units):
        mode = kv_head_mode(units, sharers, tp_size)
        hands = units_of_ranks(units, sharers, tp_size)
        for rank, local in enumerate(hands):
            heads = partition(sharers, rank, tp_size)
            ratio, rest = divmod(len(heads), len(local))
            assert rest == 0, "attention needs as many query heads for every local kv head"
            for at, head in enumerate(heads):
                assert local[at // ratio] == head // (sharers // units)
            if mode == "expand":
                assert ratio == 1
            if mode == "split":
                assert ratio == sharers // units
        assert {unit for local in hands for unit in local} == set(range(units))


@pytest.mark.parametrize("units", range(1, 7))
def test_kv_heads_are_stored_no_more_often_than_their_query_heads_need(units: int) -> None:
    for sharers, tp_size in sharings(units):
        hands = units_of_ranks(units, sharers, tp_size)
        copies = [local.count(unit) for local in hands for unit in set(local)]
        mode = kv_head_mode(units, sharers, tp_size)
        if mode == "split":
            assert [unit for local in hands for unit in local] == list(range(units))
        if mode == "replicate":
            assert set(copies) == {1}
        if mode == "expand":  # only where single copies would be used unevenly
            needs = [
                {unit: sum(h // (sharers // units) == unit for h in partition(sharers, r, tp_size))
                 for unit in local}
                for r, local in enumerate(hands)
            ]  # fmt: skip
            assert any(len(set(need.values())) > 1 for need in needs)


def test_the_three_modes_of_sharing() -> None:
    assert (kv_head_mode(8, 32, 4), units_of_ranks(8, 32, 4)[1]) == ("split", [2, 3])
    assert (kv_head_mode(2, 8, 4), units_of_ranks(2, 8, 4)) == ("replicate", [[0], [0], [1], [1]])
    assert kv_head_mode(2, 14, 4) == "expand"
    assert units_of_ranks(2, 14, 4) == [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1], [1, 1, 1]]


def test_kv_heads_are_replicated_when_tp_exceeds_them() -> None:
    assert units_of_ranks(1, 6, 6) == [[0]] * 6


def test_more_ranks_than_query_heads_are_refused() -> None:
    with pytest.raises(LayoutError, match="8 units cannot be divided over tp_size 9"):
        rank_spans([Section(2, 4, shared_by=8)], 0, 9)


@pytest.mark.parametrize(("units", "sharers"), [(3, 8), (8, 3), (2, 1)])
def test_sharers_that_are_no_multiple_of_the_units_are_refused(units: int, sharers: int) -> None:
    with pytest.raises(LayoutError, match=f"{sharers} units cannot share {units}"):
        rank_spans([Section(units, 1, shared_by=sharers)], 0, 2)


def test_a_whole_section_is_on_every_rank_beside_the_divided_one() -> None:
    parts = [Section(4, 2), Section(2, 3, replicated=True)]
    assert rank_spans(parts, 0, 4) == ((0, 2), (8, 14))
    assert rank_spans(parts, 3, 4) == ((6, 14),)  # neighbours across sections are one span


def test_a_section_begins_where_all_blocks_of_the_one_before_end() -> None:
    parts = [Section(2, 3, repeat=2), Section(2, 1)]
    assert rank_spans(parts, 0, 2) == ((0, 3), (6, 9), (12, 13))
    assert rank_spans(parts, 1, 2) == ((3, 6), (9, 12), (13, 14))


def test_units_beside_their_sharers_go_where_those_go() -> None:
    # Falcon's [q0 q1 q2 k0 v0 | q3 q4 q5 k1 v1], of width 2, over the ranks that share it.
    section = Section(2, 2, shared_by=6, group_tail=2)
    assert (section.indices_per_unit, len(section)) == (10, 20)
    assert rank_spans([section], 0, 1) == ((0, 20),)
    assert [rank_spans([section], rank, 2) for rank in range(2)] == [((0, 10),), ((10, 20),)]
    # three ranks of two query heads: the middle one's use different kv heads, so it holds both
    assert rank_spans([section], 0, 3) == ((0, 4), (6, 10))
    assert rank_spans([section], 1, 3) == ((4, 12), (16, 20))
    assert rank_spans([section], 2, 3) == ((12, 20),)


def test_units_beside_their_sharers_are_copied_for_each_where_ratios_are_unequal() -> None:
    # [q0 … q6 k0 v0 | q7 … q13 k1 v1]: rank 1 of 4 has q4 to q7, each then with its own k and v.
    assert kv_head_mode(2, 14, 4) == "expand"
    found = indices(rank_spans([Section(2, 1, shared_by=14, group_tail=2)], 1, 4))
    assert found == [4, 7, 8, 5, 7, 8, 6, 7, 8, 9, 16, 17]


def test_units_beside_their_sharers_are_replicated_where_ranks_outnumber_them() -> None:
    section = Section(2, 1, shared_by=8, group_tail=2)  # [q0 q1 q2 q3 k0 v0 | q4 q5 q6 q7 k1 v1]
    assert kv_head_mode(2, 8, 4) == "replicate"
    held_by = [indices(rank_spans([section], rank, 4)) for rank in range(4)]
    assert held_by == [[0, 1, 4, 5], [2, 3, 4, 5], [6, 7, 10, 11], [8, 9, 10, 11]]


@pytest.mark.parametrize("units", range(1, 7))
def test_grouped_shards_are_the_separate_ones_in_the_order_attention_reads(units: int) -> None:
    """Whatever the sharing, a rank's shard is, for each kv head it holds, its heads, then its own.

    Separate q, k and v of the same model say which those are.
    """
    for sharers, tp_size in sharings(units):
        ratio = sharers // units
        section = Section(units, 1, shared_by=sharers, group_tail=2)
        for rank in range(tp_size):
            heads = list(partition(sharers, rank, tp_size))
            kv = indices(held_units(Section(units, 1, shared_by=sharers), rank, tp_size))
            per = len(heads) // len(kv)
            expected = []
            for at, unit in enumerate(kv):
                own = heads[at * per : (at + 1) * per]
                assert {head // ratio for head in own} == {unit}
                expected += [unit * (ratio + 2) + head % ratio for head in own]
                expected += [unit * (ratio + 2) + ratio, unit * (ratio + 2) + ratio + 1]
            assert indices(rank_spans([section], rank, tp_size)) == expected
            assert num_indices(rank_spans([section], rank, tp_size)) == len(heads) + 2 * len(kv)


@pytest.mark.parametrize("units", range(1, 7))
def test_grouped_shards_tile_their_axis(units: int) -> None:
    for sharers, tp_size in sharings(units):
        parts = [Section(units, 3, shared_by=sharers, group_tail=2), Section(2, 1)]
        if tp_size > 2:
            parts = parts[:1]
        by_rank = [rank_spans(parts, rank, tp_size) for rank in range(tp_size)]
        whole = sum(map(len, parts))
        assert [t.start for t in cover_axis(by_rank, whole)][:1] == [0]
        assert sum(t.stop - t.start for t in cover_axis(by_rank, whole)) == whole


def test_a_grouped_section_repeats_and_is_followed_by_others() -> None:
    parts = [Section(2, 1, repeat=2, shared_by=2, group_tail=1), Section(2, 1)]
    assert indices(rank_spans(parts, 0, 2)) == [0, 1, 4, 5, 8]
    assert indices(rank_spans(parts, 1, 2)) == [2, 3, 6, 7, 9]


def test_a_grouped_axis_over_more_ranks_than_sharers_is_refused() -> None:
    with pytest.raises(LayoutError, match="6 units cannot be divided over tp_size 7"):
        rank_spans([Section(2, 4, shared_by=6, group_tail=2)], 0, 7)


def test_one_rank_holds_the_axis_as_one_span() -> None:
    parts = [Section(8, 4), Section(2, 4, shared_by=8), Section(2, 4, shared_by=8)]
    assert rank_spans(parts, 0, 1) == ((0, 48),)


def test_an_axis_of_length_zero_has_no_spans() -> None:
    assert rank_spans([Section(4, 0)], 1, 2) == ()
    assert cover_axis([(), ()], 0) == ()


def test_joining_keeps_the_indices_and_their_order() -> None:
    parts = [Span(0, 2), Span(2, 5), Span(5, 5), Span(3, 4), Span(3, 4), Span(4, 6)]
    assert coalesce(parts) == ((0, 5), (3, 4), (3, 6))
    assert indices(coalesce(parts)) == indices(tuple(parts))
    assert num_indices(coalesce(parts)) == 9


@pytest.mark.parametrize("count", [{"repeat": 1 << 40}, {"shared_by": 1 << 40}])
def test_an_axis_of_more_stretches_than_any_model_has_is_refused_at_once(
    count: dict[str, Any],
) -> None:
    with pytest.raises(LayoutError, match=rf"{1 << 40} stretches, more than the {MAX_SPANS}"):
        rank_spans([Section(2, 1, **count)], 0, 2)


@pytest.mark.parametrize("units", range(1, 7))
def test_tiles_cover_the_axis_in_order_and_give_each_index_from_its_first_holder(
    units: int,
) -> None:
    for sharers, tp_size in sharings(units):
        section = Section(units, 2, shared_by=sharers)
        by_rank = [rank_spans([section], rank, tp_size) for rank in range(tp_size)]
        kept = [indices(parts) for parts in by_rank]
        at = 0
        for found in cover_axis(by_rank, len(section)):
            assert found.start == at < found.stop
            for index in range(found.start, found.stop):
                assert kept[found.tp_rank][found.local + index - found.start] == index
                assert not any(index in kept[rank] for rank in range(found.tp_rank))
            at = found.stop
        assert at == len(section)


def test_tiles_skip_what_an_earlier_rank_gave() -> None:
    assert cover_axis([(Span(0, 4),), (Span(2, 6),)], 6) == (Tile(0, 4, 0, 0), Tile(4, 6, 1, 2))


@pytest.mark.parametrize("by_rank", [[(Span(0, 3),), (Span(4, 6),)], [(Span(0, 5),)], [()]])
def test_an_index_that_no_rank_holds_is_refused(by_rank: list[tuple[Span, ...]]) -> None:
    with pytest.raises(LayoutError, match="of an axis of 6"):
        cover_axis(by_rank, 6)
