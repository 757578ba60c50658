"""The notation of a fused axis: what each form means, and what is refused by name."""

import pytest

from shardkit.errors import RecipeError
from shardkit.layout.axis import Term, Unit, parse_axis, resolve_sections
from shardkit.layout.spans import Section

UNITS = {
    "heads": Unit(8),
    "kv_heads": Unit(2, shared_by=8),
    "ffn": Unit(None),
    "vocab": Unit(None),
}


def resolved(text: str, axis_length: int) -> tuple[Section, ...]:
    return resolve_sections(parse_axis(text), axis_length, UNITS)


def test_a_unit_alone_divides_the_whole_axis() -> None:
    assert resolved("heads", 64) == (Section(8, 8),)


def test_a_number_before_the_unit_makes_blocks() -> None:
    assert resolved("3 heads", 96) == (Section(8, 4, repeat=3),)


def test_a_number_after_the_unit_is_part_of_it() -> None:
    assert resolved("heads 3", 96) == (Section(8, 12),)


def test_sections_side_by_side_have_units_of_one_size() -> None:
    q, kv = Section(8, 4), Section(2, 4, shared_by=8)
    assert resolved("heads + kv_heads + kv_heads", 48) == (q, kv, kv)


def test_a_section_without_a_unit_is_whole_on_every_rank() -> None:
    assert resolved("heads + 2", 40) == (Section(8, 4), Section(2, 4, replicated=True))


def test_numbers_multiply() -> None:
    assert parse_axis("2 3 heads 4 5") == (Term((2, 3), "heads", (4, 5)),)
    assert parse_axis("2 3") == (Term((2, 3), None),)


def test_spaces_are_free() -> None:
    assert parse_axis("  heads+2 ") == parse_axis("heads + 2")


def test_a_unit_without_a_count_divides_anyhow() -> None:
    assert resolved("ffn", 7) == (Section(7, 1),)
    assert resolved("2 ffn", 14) == (Section(7, 1, repeat=2),)
    assert resolved("ffn 2", 14) == (Section(7, 2),)
    assert resolved("ffn + ffn", 14) == (Section(7, 1), Section(7, 1))


def test_a_unit_stands_beside_the_sharers_it_is_stored_with() -> None:
    assert parse_axis("kv_heads (heads + 2)") == (Term((), "kv_heads", (), "heads", 2),)
    # 2 kv heads, each with its 4 query heads and then 2 of its own: 12 pieces of 4
    assert resolved("kv_heads (heads + 2)", 48) == (Section(2, 4, shared_by=8, group_tail=2),)
    assert resolved("kv_heads (heads + 1)", 40) == (Section(2, 4, shared_by=8, group_tail=1),)
    assert parse_axis(" kv_heads(heads+2) ") == parse_axis("kv_heads (heads + 2)")


def test_a_section_with_sharers_stands_beside_others() -> None:
    grouped, q = Section(2, 4, shared_by=8, group_tail=2), Section(8, 4)
    assert resolved("kv_heads (heads + 2) + heads", 80) == (grouped, q)
    assert resolved("heads + kv_heads (heads + 2)", 80) == (q, grouped)


def test_counts_are_factors_and_not_divided() -> None:
    counts = {"experts": 4, "width": 6, "state": 5}
    units = {**UNITS, "groups": Unit(2)}

    def found(text: str, axis_length: int) -> tuple[Section, ...]:
        return resolve_sections(parse_axis(text, counts), axis_length, units, counts)

    assert parse_axis("experts ffn", counts) == (Term(("experts",), "ffn"),)
    assert parse_axis("experts ffn", counts)[0].counts == {"experts"}
    assert found("experts ffn", 28) == (Section(7, 1, repeat=4),)
    assert found("heads width + groups state", 58) == (Section(8, 6), Section(2, 5))
    assert found("2 heads width", 96) == (Section(8, 6, repeat=2),)
    assert found("heads + experts", 12) == (Section(8, 1), Section(4, 1, replicated=True))


def test_a_count_that_the_config_lacks_is_named() -> None:
    with pytest.raises(RecipeError, match=r"count 'experts': config\.json does not have it"):
        resolve_sections(parse_axis("experts ffn", ("experts",)), 28, UNITS, {})


@pytest.mark.parametrize(
    "text", ["kv_heads (heads + 0)", "kv_heads (heads + 9999999)", "experts (heads + 2)",
             "kv_heads (experts + 2)"],
)  # fmt: skip
def test_what_stands_beside_sharers_is_a_unit_and_some_pieces(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not UNIT \(OTHER \+ NUMBER\)"):
        parse_axis(text, ("experts",))


@pytest.mark.parametrize(
    "text", ["2 kv_heads (heads + 2)", "kv_heads (heads)", "kv_heads (2 + heads)",
             "kv_heads (heads + 2", "kv_heads (heads + kv_heads)", "(heads + 2)"],
)  # fmt: skip
def test_brackets_have_no_other_form(text: str) -> None:
    with pytest.raises(RecipeError, match="axis "):
        parse_axis(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty section"),
        ("heads +", "empty section"),
        ("+ heads", "empty section"),
        ("heads ++ heads", "empty section"),
        ("Heads", "Heads"),
        ("heads * 3", r"\*"),
        ("heads/4", "heads/4"),
        ("heads - 1", "'-' is not a unit"),
        ("0 heads", "'0' is not a unit"),
        ("-3 heads", "-3"),
        ("1.5 heads", "1.5"),
        ("٣ heads", "٣"),  # an Arabic-Indic 3, which int() would take
        ("99999999999 heads", "99999999999"),
        ("heads.__class__", "heads.__class__"),
        ("__import__('os').system('true')", "__import__"),
        ("heads kv_heads", "one unit, not 2"),
    ],
)
def test_a_word_that_is_no_unit_is_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word) as caught:
        parse_axis(text)
    assert "axis " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "axis_length", "shown"),
    [
        ("heads", 63, r"axis of 63 is not a multiple of 8 = 8"),
        ("3 heads", 64, r"axis of 64 is not a multiple of 3\*8 = 24"),
        ("heads + kv_heads + 2", 50, r"axis of 50 is not a multiple of 8 \+ 2 \+ 2 = 12"),
        ("kv_heads (heads + 2)", 50, r"axis of 50 is not a multiple of 2\*6 = 12"),
        ("2 ffn", 7, r"axis of 7 is not a multiple of 2\*3 = 6"),
        ("2 ffn", 1, r"axis of 1 is not a multiple"),
    ],
)
def test_an_axis_of_the_wrong_length_is_refused_with_the_numbers(
    text: str, axis_length: int, shown: str
) -> None:
    with pytest.raises(RecipeError, match=shown):
        resolved(text, axis_length)


@pytest.mark.parametrize("text", ["ffn + heads", "ffn + 2", "ffn + vocab"])
def test_a_unit_without_a_count_stands_alone(text: str) -> None:
    with pytest.raises(RecipeError, match="'ffn' has no count"):
        resolved(text, 64)
