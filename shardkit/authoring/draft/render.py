"""A draft as a recipe file that a person can read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from shardkit.authoring.draft.module_attributes import Argument, Attribute
from shardkit.authoring.draft.regions import Axis, Count, Region

WIDTH = 96


@dataclass(frozen=True)
class Part:
    """A region, and what counts its units in the modules."""

    region: Region
    attributes: tuple[Attribute, ...] = ()
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Content:
    """What a draft says."""

    model_type: str
    prefix: str
    vocab: tuple[str, ...]
    parts: tuple[Part, ...]
    replicate: tuple[str, ...]
    whole: Mapping[str, str]
    comment: tuple[str, ...] = field(default=())


def written(content: Content) -> str:
    """The text of the recipe file."""
    rules = [axis for part in content.parts for axis in part.region.rules]
    in_out = [axis.pattern for axis in rules if axis.in_out]
    lines = [f"# {line}".rstrip() for told in content.comment for line in wrap(told, WIDTH) or [""]]
    lines.append(f"model_types = [{_quoted(content.model_type)}]")
    if content.prefix:
        lines.append(f"base_model_prefix = {_quoted(content.prefix)}")
    lines.append("")
    once = [p for part in content.parts for p in part.region.once]
    for key, patterns in (
        ("vocab", content.vocab), ("replicate", content.replicate), ("once", once),
    ):  # fmt: skip
        lines += _list(key, joined(patterns))
    lines += _list("in_out", list(_values(rules, in_out)))
    lines += _units(content.parts)
    for style in ("column", "row", "norm"):
        own = {axis.pattern: _axis(axis) for axis in rules if axis.style == style}
        lines += _table(style, grouped(own, in_out))
    lines += _table("whole", {p: _quoted(reason) for p, reason in _by_reason(content.whole)})
    lines += _table("local", grouped(_attributes(content.parts)))
    lines += _table("arguments", grouped(_arguments(content.parts)))
    return "\n".join(lines) + "\n"


def joined(patterns: Iterable[str]) -> list[str]:
    """The patterns, those that differ in one word put together with braces."""
    found: list[str] = []
    for pattern in dict.fromkeys(patterns):
        for at, other in enumerate(found):
            if both := _together(other, pattern):
                found[at] = both
                break
        else:
            found.append(pattern)
    return found


def grouped(table: Mapping[str, str], apart: Sequence[str] = ()) -> dict[str, str]:
    """A table with the patterns of one value joined; those in `apart` by themselves."""
    by_value: dict[tuple[str, bool], list[str]] = {}
    for pattern, value in table.items():
        by_value.setdefault((value, pattern in apart), []).append(pattern)
    return {p: value for (value, _), same in by_value.items() for p in joined(same)}


def _values(rules: Sequence[Axis], in_out: Sequence[str]) -> Iterable[str]:
    """The in_out patterns as the tables of rules spell them."""
    for style in ("column", "row"):
        own = {axis.pattern: _axis(axis) for axis in rules if axis.style == style}
        flipped = {p: value for p, value in own.items() if p in in_out}
        yield from grouped(flipped, in_out)


def _together(one: str, other: str) -> str:
    """Two patterns as one, where they differ in one word between dots; else nothing."""
    left, right = one.split("."), other.split(".")
    if len(left) != len(right):
        return ""
    differ = [at for at, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    if len(differ) != 1:
        return ""
    at = differ[0]
    words = [*left[at].strip("{}").split(","), *right[at].strip("{}").split(",")]
    if "*" in words or any(len(w) == 0 for w in words):
        return ""
    return ".".join([*left[:at], "{" + ",".join(dict.fromkeys(words)) + "}", *left[at + 1 :]])


def _axis(axis: Axis) -> str:
    text = _quoted(axis.text)
    return text if axis.dim is None else f"{{ axis = {text}, dim = {axis.dim} }}"


def _units(parts: Sequence[Part]) -> list[str]:
    units: dict[str, str] = {}
    for part in parts:
        unit, shared = part.region.unit, part.region.shared
        units.setdefault(unit.name, _fields(unit))
        if shared:
            shares = f"{{ count = {_fields(shared)}, shared_by = {_quoted(unit.name)} }}"
            units.setdefault(shared.name, shares)
    return _table("units", units)


def _fields(count: Count) -> str:
    return json.dumps(count.fields[0] if len(count.fields) == 1 else list(count.fields))


def _attributes(parts: Sequence[Part]) -> dict[str, str]:
    by_module: dict[str, dict[str, str]] = {}
    for part in parts:
        for a in part.attributes:
            by_module.setdefault(a.module, {})[a.name] = a.text
    return {
        module: "{ " + ", ".join(f"{_key(n)} = {_quoted(t)}" for n, t in own.items()) + " }"
        for module, own in by_module.items()
    }


def _arguments(parts: Sequence[Part]) -> dict[str, str]:
    return {
        a.module: f"{{ {_key(a.name)} = {{ dim = {a.dim}, axis = {_quoted(a.axis)} }} }}"
        for part in parts
        for a in part.arguments
    }


def _by_reason(whole: Mapping[str, str]) -> list[tuple[str, str]]:
    by_reason: dict[str, list[str]] = {}
    for pattern, reason in whole.items():
        by_reason.setdefault(reason, []).append(pattern)
    return [(p, reason) for reason, same in by_reason.items() for p in joined(same)]


def _list(key: str, values: Sequence[str]) -> list[str]:
    if not values:
        return []
    line = f"{key} = [{', '.join(map(_quoted, values))}]"
    if len(line) <= WIDTH:
        return [line]
    return [f"{key} = [", *(f"    {_quoted(value)}," for value in values), "]"]


def _table(name: str, entries: Mapping[str, str]) -> list[str]:
    if not entries:
        return []
    return ["", f"[{name}]", *(f"{_key(key)} = {value}" for key, value in entries.items())]


def _key(text: str) -> str:
    return text if text.replace("_", "").isalnum() and text.isascii() else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
