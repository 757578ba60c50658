"""A quantized format: one logical weight `[..., out, in]`, stored as several tensors.

The weight is `(codes - zero_point) * scales`, element by element. Each stored tensor has an axis
for some of the weight's: one stored index stands for one, for as many as are packed into a word,
or for a block. `recipes/README.md` describes the files.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shardkit.dtypes import DTYPES
from shardkit.errors import RecipeError
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.recipe.toml_values import expect_flag, expect_string, expect_strings, expect_table

FOLDER = "formats"
AXES = ("out", "in")
PACKED, WHOLE = "packed", "all"
ELEMENTS = ("number", "e2m1", "e8m0", "uint")
ROLES = ("codes", "zero_point", "group_index")
LISTS = ("scales", "others")
KEYS = {"title", "when", "unless", "numbers", "constants", "refuse", "transposed", *LISTS, *ROLES}
TENSOR_KEYS = {
    "suffix", "dtypes", "axes", "element", "bits", "offset", "order", "divides", "optional",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredAxis:
    """One axis of a stored tensor.

    Attributes:
        axis: The weight's axis that it follows, `out` or `in`; empty if it follows none.
        per: How many of the weight's indices one of its own stands for: a number, or the name of
            one; `packed` for as many as a word holds, `all` for every one.
    """

    axis: str
    per: int | str = 1


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One of the tensors that store a weight.

    Attributes:
        suffix: What its name has after the module's: `weight_scale`. It begins with an
            underscore if it follows the name of a parameter, not of a module.
        axes: Its axes, without those before `out` and `in` (a stack of experts).
        dtypes: The dtypes that it may have.
        element: What it holds: numbers of its own dtype (`number`), FP4 numbers (`e2m1`), powers
            of two in a byte each (`e8m0`), or unsigned integers (`uint`).
        bits: The bits of an integer: a number, or the name of one.
        offset: What is subtracted from an integer: a number, or `half` of the range.
        order: In which order the elements of a word lie, if it is not the usual one.
        divides: Whether a scale divides.
        optional: Whether a weight may lack it.
    """

    suffix: str
    axes: tuple[StoredAxis, ...]
    dtypes: tuple[str, ...]
    element: str = "number"
    bits: int | str = 0
    offset: int | str = 0
    order: tuple[int, ...] = ()
    divides: bool = False
    optional: bool = False

    @property
    def follows_parameter(self) -> bool:
        """Whether its suffix follows the name of a parameter, as of a stack, not of a module."""
        return self.suffix.startswith("_")

    def name_after(self, base: str) -> str:
        """The tensor's whole name, after what all tensors of the weight begin with."""
        return f"{base}{self.suffix}" if self.follows_parameter else f"{base}.{self.suffix}"


@dataclass(frozen=True, slots=True)
class Format:
    """One quantized format.

    Attributes:
        name: The name of its file.
        title: What a user reads.
        when: For config fields, the values that a config of this format has one of.
        unless: The same for values that it has not.
        numbers: For each number, the config fields of which the first that is there counts; or a
            number itself, or `all`.
        codes: What holds the weight's elements.
        scales: What they are multiplied by.
        zero_point: What is subtracted from them.
        group_index: For each index of `in`, the group that it is of.
        others: What else is stored of a weight and divided like it.
        constants: Suffixes of tensors that every rank holds whole, and nothing is computed with.
        transposed: Whether the weight would be stored `[in, out]` in 16 bits.
        refuse: Why such a checkpoint cannot be split, and what to do; empty if it can.
    """

    name: str
    title: str
    when: Mapping[str, tuple[Any, ...]]
    unless: Mapping[str, tuple[Any, ...]]
    numbers: Mapping[str, tuple[int | str, ...]]
    codes: StoredPart
    scales: tuple[StoredPart, ...] = ()
    zero_point: StoredPart | None = None
    group_index: StoredPart | None = None
    others: tuple[StoredPart, ...] = ()
    constants: tuple[str, ...] = ()
    transposed: bool = False
    refuse: str = ""

    @property
    def tensors(self) -> tuple[StoredPart, ...]:
        """All that is stored of a weight, its codes first."""
        rest = (self.zero_point, self.group_index, *self.others)
        return (self.codes, *self.scales, *(each for each in rest if each is not None))


@dataclass(frozen=True)
class Scheme:
    """A format with its numbers, as one config has them; None for the whole of an axis."""

    format: Format
    numbers: Mapping[str, int | None]

    def resolve(self, value: int | str) -> int | None:
        """A number, given or by name; None for the whole of an axis."""
        if isinstance(value, int):
            return value
        return None if value == WHOLE else self.numbers[value]

    def count_per_index(self, tensor: StoredPart, axis: StoredAxis, dtype: str) -> int | None:
        """How many of the weight's indices one stored index stands for; None for all of them."""
        return self.count_packed(tensor, dtype) if axis.per == PACKED else self.resolve(axis.per)

    def count_packed(self, tensor: StoredPart, dtype: str) -> int:
        """How many elements one stored value holds. Raises RecipeError if that is no number."""
        if tensor.element in ("number", "e8m0"):
            return 1
        bits = 4 if tensor.element == "e2m1" else self.resolve(tensor.bits) or 0
        if not bits or DTYPES[dtype].bits % bits:
            raise RecipeError(
                f"{self.format.title} with {bits} bits: its elements cross the words they are"
                " stored in and cannot be divided; quantize to 4 or 8 bits, or split the 16-bit"
                " weights"
            )
        return DTYPES[dtype].bits // bits


@cache
def list_formats() -> tuple[Format, ...]:
    """Every format, by the order of their files' names. Raises RecipeError."""
    folder = find_recipe_folder() / FOLDER
    return tuple(map(load_format, sorted(folder.glob("*.toml"))))


def load_format(path: Path) -> Format:
    """A format from its file. Raises RecipeError naming what is wrong."""
    try:
        return parse_format(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except (RecipeError, tomllib.TOMLDecodeError, OSError) as fault:
        raise RecipeError(f"{path}: {fault}") from None


def parse_format(name: str, table: dict[str, Any]) -> Format:
    """A format from its table. Raises RecipeError."""
    if wrong := sorted(table.keys() - KEYS):
        raise RecipeError(f"unknown key {wrong[0]!r}; known: {', '.join(sorted(KEYS))}")
    refuse = expect_string(table.get("refuse", ""), "refuse")
    codes = {"suffix": "weight", "dtypes": [], "axes": []} if refuse else table.get("codes")
    return Format(
        name,
        expect_string(table.get("title", ""), "title"),
        _parse_values(table, "when"),
        _parse_values(table, "unless"),
        {key: _parse_number(value, key) for key, value in expect_table(table, "numbers").items()},
        _parse_tensor(codes, "codes"),
        _parse_tensors(table, "scales"),
        zero_point=_parse_optional(table, "zero_point"),
        group_index=_parse_optional(table, "group_index"),
        others=_parse_tensors(table, "others"),
        constants=expect_strings(table, "constants"),
        transposed=expect_flag(table, "transposed"),
        refuse=refuse,
    )


def _parse_values(table: dict[str, Any], key: str) -> dict[str, tuple[Any, ...]]:
    values = expect_table(table, key)
    if wrong := [name for name, value in values.items() if not isinstance(value, list)]:
        raise RecipeError(f"{key}.{wrong[0]} must be a list of values")
    return {name: tuple(value) for name, value in values.items()}


def _parse_number(value: Any, key: str) -> tuple[int | str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, int | str) for each in value):
        raise RecipeError(f"numbers.{key} must be a list of config fields and numbers")
    return tuple(value)


def _parse_optional(table: dict[str, Any], key: str) -> StoredPart | None:
    return _parse_tensor(table[key], key) if key in table else None


def _parse_tensors(table: dict[str, Any], key: str) -> tuple[StoredPart, ...]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise RecipeError(f"{key} must be a list of tables")
    return tuple(_parse_tensor(each, key) for each in value)


def _parse_tensor(table: Any, key: str) -> StoredPart:
    if not isinstance(table, dict):
        raise RecipeError(f"{key} must be a table")
    if wrong := sorted(table.keys() - TENSOR_KEYS):
        raise RecipeError(f"{key}: unknown key {wrong[0]!r}")
    dtypes = expect_strings(table, "dtypes")
    if wrong := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise RecipeError(f"{key}: no dtype {wrong[0]!r}")
    element = expect_string(table.get("element", "number"), "element")
    if element not in ELEMENTS:
        raise RecipeError(f"{key}: element {element!r} is none of {', '.join(ELEMENTS)}")
    return StoredPart(
        expect_string(table.get("suffix"), f"{key}.suffix"),
        tuple(_parse_axis(text, key) for text in expect_strings(table, "axes")),
        dtypes,
        element,
        table.get("bits", 0),
        table.get("offset", 0),
        tuple(table.get("order", ())),
        expect_flag(table, "divides"),
        expect_flag(table, "optional"),
    )


def _parse_axis(text: str, key: str) -> StoredAxis:
    """`in`, `in / group`, or a number of indices that follow no axis."""
    axis, slash, per = (word.strip() for word in text.partition("/"))
    if axis.isdigit() and not slash:
        return StoredAxis("", int(axis))
    if axis not in AXES or (slash and not per):
        raise RecipeError(f"{key}: axis {text!r} is not `out`, `in`, one of them `/ NUMBER`, or 16")
    return StoredAxis(axis, 1 if not slash else int(per) if per.isdigit() else per)
