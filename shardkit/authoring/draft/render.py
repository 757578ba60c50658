"""A draft as a recipe file that a person can read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from shardkit.authoring.draft.module_attributes import DraftArgument, DraftAttribute
from shardkit.authoring.draft.regions import DraftRule, ParallelRegion
from shardkit.authoring.draft.unit_counts import UnitCount

WIDTH = 96


@dataclass(frozen=True)
class DraftRegion:
    """A parallel region, and what counts its units in the modules around it."""

    region: ParallelRegion
    attributes: tuple[DraftAttribute, ...] = ()
    arguments: tuple[DraftArgument, ...] = ()


@dataclass(frozen=True)
class DraftRecipe:
    """What a draft's recipe file says.

    Attributes:
        model_type: The model type that it is for.
        base_model_prefix: The prefix that checkpoints of the base model lack; empty if none.
        vocab: Patterns of the vocabulary's modules.
        regions: The regions that are divided.
        replicate: Patterns of small modules that every rank holds.
        replicated: Patterns of large modules that every rank holds, and why.
        comment: Paragraphs at the head of the file.
    """

    model_type: str
    base_model_prefix: str
    vocab: tuple[str, ...]
    regions: tuple[DraftRegion, ...]
    replicate: tuple[str, ...]
    replicated: Mapping[str, str]
    comment: tuple[str, ...] = ()

    @property
    def rules(self) -> list[DraftRule]:
        """The rules that divide a tensor, of all regions."""
        return [rule for region in self.regions for rule in region.region.rules]


def render_recipe(recipe: DraftRecipe) -> str:
    """The text of the recipe file."""
    rules = recipe.rules
    flipped = [rule.pattern for rule in rules if rule.fan_in_fan_out]
    add_once = [p for region in recipe.regions for p in region.region.add_once]
    lines = _render_head(recipe)
    lines += _render_list("vocab", merge_patterns(recipe.vocab))
    lines += _render_list("replicate", merge_patterns(recipe.replicate))
    lines += _render_list("add_once", merge_patterns(add_once))
    lines += _render_list("fan_in_fan_out", list(_merge_flipped(rules, flipped)))
    lines += _render_table("units", _unit_entries(recipe.regions))
    for style in ("column", "row", "norm"):
        axes = {rule.pattern: _axis_value(rule) for rule in rules if rule.style == style}
        lines += _render_table(style, group_by_value(axes, flipped))
    lines += _render_table("replicated", _reason_entries(recipe.replicated))
    lines += _render_table("module_attributes", group_by_value(_attribute_entries(recipe.regions)))
    lines += _render_table("forward_arguments", group_by_value(_argument_entries(recipe.regions)))
    return "\n".join(lines) + "\n"


def merge_patterns(patterns: Iterable[str]) -> list[str]:
    """The patterns, those that differ in one word merged with braces."""
    merged: list[str] = []
    for pattern in dict.fromkeys(patterns):
        for index, other in enumerate(merged):
            if both := _merge_pair(other, pattern):
                merged[index] = both
                break
        else:
            merged.append(pattern)
    return merged


def group_by_value(entries: Mapping[str, str], flipped: Sequence[str] = ()) -> dict[str, str]:
    """A table with the patterns of equal values merged; those in `flipped` among themselves."""
    by_value: dict[tuple[str, bool], list[str]] = {}
    for pattern, value in entries.items():
        by_value.setdefault((value, pattern in flipped), []).append(pattern)
    return {p: value for (value, _), same in by_value.items() for p in merge_patterns(same)}


def _merge_flipped(rules: Sequence[DraftRule], flipped: Sequence[str]) -> Iterable[str]:
    """The patterns of weights stored `[in, out]`, spelled as the tables of rules spell them."""
    for style in ("column", "row"):
        yield from group_by_value(
            {
                rule.pattern: _axis_value(rule)
                for rule in rules
                if rule.style == style and rule.pattern in flipped
            },
            flipped,
        )


def _merge_pair(one: str, other: str) -> str:
    """Two patterns as one if they differ in one word between dots; else an empty string."""
    left, right = one.split("."), other.split(".")
    if len(left) != len(right):
        return ""
    differing = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    if len(differing) != 1:
        return ""
    (index,) = differing
    words = [*left[index].strip("{}").split(","), *right[index].strip("{}").split(",")]
    if "*" in words or "" in words:
        return ""
    left[index] = "{" + ",".join(dict.fromkeys(words)) + "}"
    return ".".join(left)


def _render_head(recipe: DraftRecipe) -> list[str]:
    lines = [
        f"# {line}".rstrip()
        for paragraph in recipe.comment
        for line in wrap(paragraph, WIDTH) or [""]
    ]
    lines.append(f"model_types = [{_quote(recipe.model_type)}]")
    if recipe.base_model_prefix:
        lines.append(f"base_model_prefix = {_quote(recipe.base_model_prefix)}")
    return [*lines, ""]


def _axis_value(rule: DraftRule) -> str:
    axis = _quote(rule.axis)
    return axis if rule.dim is None else f"{{ axis = {axis}, dim = {rule.dim} }}"


def _unit_entries(regions: Sequence[DraftRegion]) -> dict[str, str]:
    entries: dict[str, str] = {}
    for region in regions:
        unit, shared = region.region.unit, region.region.shared
        entries.setdefault(unit.name, _count_value(unit))
        if shared:
            value = f"{{ count = {_count_value(shared)}, shared_by = {_quote(unit.name)} }}"
            entries.setdefault(shared.name, value)
    return entries


def _count_value(count: UnitCount) -> str:
    return json.dumps(count.fields[0] if len(count.fields) == 1 else list(count.fields))


def _attribute_entries(regions: Sequence[DraftRegion]) -> dict[str, str]:
    by_module: dict[str, dict[str, str]] = {}
    for region in regions:
        for attribute in region.attributes:
            by_module.setdefault(attribute.module, {})[attribute.name] = attribute.unit
    return {
        module: "{ " + ", ".join(f"{_key(n)} = {_quote(u)}" for n, u in units.items()) + " }"
        for module, units in by_module.items()
    }


def _argument_entries(regions: Sequence[DraftRegion]) -> dict[str, str]:
    return {
        a.module: f"{{ {_key(a.name)} = {{ dim = {a.dim}, axis = {_quote(a.axis)} }} }}"
        for region in regions
        for a in region.arguments
    }


def _reason_entries(replicated: Mapping[str, str]) -> dict[str, str]:
    return {p: _quote(reason) for p, reason in group_by_value(replicated).items()}


def _render_list(key: str, values: Sequence[str]) -> list[str]:
    if not values:
        return []
    line = f"{key} = [{', '.join(map(_quote, values))}]"
    if len(line) <= WIDTH:
        return [line]
    return [f"{key} = [", *(f"    {_quote(value)}," for value in values), "]"]


def _render_table(name: str, entries: Mapping[str, str]) -> list[str]:
    if not entries:
        return []
    return ["", f"[{name}]", *(f"{_key(key)} = {value}" for key, value in entries.items())]


def _key(text: str) -> str:
    return text if text.replace("_", "").isalnum() and text.isascii() else _quote(text)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
