"""Composes a recipe of the recipes of its parts: a text model and a vision encoder, say.

A part's rules are those of its own recipe, with its module before every name, its config's field
before every field, and for all but the first part a prefix before every unit.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardkit.config_fields import HEADS
from shardkit.errors import RecipeError
from shardkit.layout import Term
from shardkit.layout.style import IGNORE, REPLICATE
from shardkit.recipe.catalog import find_recipe, load_heads
from shardkit.recipe.counts import read_field, read_part_config
from shardkit.recipe.joint_sums import JointSum
from shardkit.recipe.layer_kinds import number_layers
from shardkit.recipe.model_classes import list_buffers, read_classes
from shardkit.recipe.patterns import compile_tensor_pattern
from shardkit.recipe.recipe import (
    ForwardArgument,
    ModuleAttribute,
    Part,
    Recipe,
    Rule,
    UnitRule,
)

VOCAB = "vocab"  # a unit of every recipe


def compose_recipe(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """The recipe with the rules of its parts, as a config has them, and those of any model.

    Args:
        recipe: The outer recipe.
        config: The whole config.json.

    Raises:
        RecipeError: If a part's model_type has no recipe, or that recipe has parts itself.
    """
    model_type = str(config.get("model_type"))
    recipe = _fit_layers(recipe, config)
    if recipe.parts:
        return add_common_rules(_compose_parts(recipe, config), model_type)
    prefixes = {each.prefix for each in read_classes(model_type)} - {""}
    others = sorted(prefixes - {*list_alternatives(recipe.base_model_prefix)})
    return add_common_rules(replace(recipe, other_prefixes=tuple(others)), model_type)


def add_common_rules(recipe: Recipe, model_type: str) -> Recipe:
    """The recipe with rules for what it does not name: any model's heads, old buffers, old names.

    Args:
        recipe: The recipe.
        model_type: A type of transformers, which says what its buffers are.
    """
    heads = [head for head in load_heads() if not recipe.rules_for(f"{head}.weight")]
    names = [name for name in list_buffers(model_type) if not recipe.rules_for(name)]
    prefixes = recipe.base_model_prefix, recipe.other_prefixes
    buffers: dict[str, re.Pattern[str]] = {}
    bases = tuple(f"{base}." for base in list_alternatives(recipe.base_model_prefix))
    for name in sorted(names, key=lambda name: not name.startswith(bases)):
        if not any(pattern.fullmatch(name) for pattern in buffers.values()):
            pattern = compile_tensor_pattern(name, *prefixes)
            buffers = {n: p for n, p in buffers.items() if not pattern.fullmatch(n)}
            buffers[name] = pattern
    places = {each.place for each in read_classes(model_type)} - {""}
    rules = [Rule(head, REPLICATE) for head in heads] + [Rule(name, IGNORE) for name in buffers]
    every = [each.renames for each in read_classes(model_type)]
    pairs = [pair for each in every for pair in each.items()]
    renames = {own: name for name, own in pairs} | dict(pairs)
    return replace(
        recipe,
        rules=(*recipe.rules, *rules),
        places=tuple(sorted(places)),
        renames=every[0] if every else {},
        other_renames=renames,
    )


def _compose_parts(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    nested = [_Nesting(recipe, part, at == 0) for at, part in enumerate(recipe.parts)]
    named = [(each.part.config_field, each.nest(config)) for each in nested]
    parts = [(field, inner) for field, inner in named if inner is not None]
    names = Counter(
        (field, name) for field, inner in parts for name in inner.units.keys() - {VOCAB}
    )
    if twice := sorted(key for key, times in names.items() if times > 1):
        field, name = twice[0]
        raise RecipeError(f"recipe {recipe.name!r}: parts.{field}: two parts have a unit {name!r}")
    every = [recipe, *(inner for _, inner in parts)]
    return replace(
        recipe,
        sha256=hashlib.sha256("".join(r.sha256 for r in every).encode()).hexdigest(),
        rules=tuple(rule for r in every for rule in r.rules),
        units={name: unit for r in every for name, unit in r.units.items()},
        counts={name: count for r in every for name, count in r.counts.items()},
        module_attributes=tuple(a for r in every for a in r.module_attributes),
        forward_arguments=tuple(a for r in every for a in r.forward_arguments),
        joint_sums=tuple(joint for r in every for joint in r.joint_sums),
        expert_modules=tuple(dict.fromkeys(name for r in every for name in r.expert_modules)),
        parts=(),
    )


@dataclass(frozen=True, slots=True)
class _Nesting:
    """One part of a recipe. The first is the language model: its units keep their names."""

    outer: Recipe
    part: Part
    is_first: bool

    def nest(self, config: Mapping[str, Any]) -> Recipe | None:
        """The part's recipe, in the outer model's names; None if this config has no such part."""
        field = self.part.config_field
        # Older configs have the text model's fields outermost.
        is_outermost = self.is_first and field not in config and _counts_heads(config)
        needs_type = not self.part.recipe
        part_config = None if is_outermost else read_part_config(config, field, needs_type)
        if part_config is None and not self.is_first:
            return None
        try:
            inner = find_recipe(part_config or config, self.part.recipe or None)
        except RecipeError as error:
            raise RecipeError(f"config.json: {field}: {error}") from None
        if inner.parts:
            raise RecipeError(
                f"recipe {self.outer.name!r}: parts.{field}: recipe {inner.name!r} has parts itself"
            )
        inner = _fit_layers(inner, part_config or config)
        table = "" if part_config is None else f"{field}."
        return replace(
            inner,
            rules=tuple(self._nest_rule(rule, inner.base_model_prefix) for rule in inner.rules),
            units={self._nest_name(n): self._nest_count(u, table) for n, u in inner.units.items()},
            counts={
                self._nest_name(n): self._nest_count(c, table) for n, c in inner.counts.items()
            },
            module_attributes=tuple(
                self._nest_attribute(a, inner.base_model_prefix) for a in inner.module_attributes
            ),
            forward_arguments=tuple(
                self._nest_argument(a, inner.base_model_prefix) for a in inner.forward_arguments
            ),
            joint_sums=tuple(
                self._nest_joint_sum(joint, inner.base_model_prefix) for joint in inner.joint_sums
            ),
        )

    def _nest_name(self, unit: str) -> str:
        """A unit's or count's name in the outer recipe."""
        if self.is_first or unit in ("", VOCAB) or "." in unit:
            return unit
        return f"{self.part.config_field.removesuffix('_config').replace('.', '_')}_{unit}"

    def _nest_count(self, rule: UnitRule, table: str) -> UnitRule:
        fields = tuple(
            " ".join(word if word.isdigit() or word == "/" else table + word for word in f.split())
            for f in rule.fields
        )
        return UnitRule(fields, self._nest_name(rule.shared_by), rule.block)

    def _nest_rule(self, rule: Rule, prefix: str) -> Rule:
        terms = tuple(self._nest_term(term) for term in rule.terms)
        pattern, whole = self._nest_pattern(rule.pattern, prefix), self._nest_name(rule.whole)
        return replace(rule, pattern=pattern, terms=terms, whole=whole)

    def _nest_term(self, term: Term) -> Term:
        outer, inner = (
            tuple(self._nest_name(f) if isinstance(f, str) else f for f in factors)
            for factors in (term.outer, term.inner)
        )
        unit = None if term.unit is None else self._nest_name(term.unit)
        return replace(
            term, outer=outer, unit=unit, inner=inner, shared_by=self._nest_name(term.shared_by)
        )

    def _nest_pattern(self, pattern: str, prefix: str) -> str:
        """A pattern of tensors under the part's module; an output layer may stand outside of it."""
        module = self.part.module
        if not prefix:
            return f"{module}.{pattern}"
        if pattern.startswith(f"{prefix}."):
            return f"{module}.{_make_optional([prefix])}{pattern[len(prefix) + 1 :]}"
        modules = [*list_alternatives(module)]
        outer = f"{self.outer.base_model_prefix}."
        modules += [m.removeprefix(outer) for m in modules if m.startswith(outer)]
        if self.is_first:
            return f"{_make_optional(modules)}{pattern}"
        return f"{{{','.join(f'{m}.' for m in modules)}}}{pattern}"

    def _nest_module(self, pattern: str, prefix: str) -> str:
        """A pattern of modules of transformers' model, under the part's own."""
        module = next(iter(list_alternatives(self.part.module)))
        inside = f"{module}.".removeprefix(f"{self.outer.base_model_prefix}.")
        return f"{inside}{_make_optional([prefix]) if prefix else ''}{pattern}"

    def _nest_attribute(self, rule: ModuleAttribute, prefix: str) -> ModuleAttribute:
        return replace(
            rule,
            module=self._nest_module(rule.module, prefix),
            unit=self._nest_name(rule.unit),
            per_unit=self._nest_name(rule.per_unit),
        )

    def _nest_argument(self, rule: ForwardArgument, prefix: str) -> ForwardArgument:
        module = self._nest_module(rule.module, prefix)
        return replace(rule, module=module, unit=self._nest_name(rule.unit))

    def _nest_joint_sum(self, joint: JointSum, prefix: str) -> JointSum:
        """The sum of the part's modules, by the model's names of them and by those on disk."""
        modules = list_alternatives(self.part.module)
        inside = (m.removeprefix(f"{self.outer.base_model_prefix}.") for m in modules)
        names = ",".join(f"{name}." for name in dict.fromkeys([*inside, *modules]))
        nested = f"{{{names}}}{_make_optional([prefix]) if prefix else ''}{joint.module}"
        return replace(joint, module=nested)


def _fit_layers(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """The recipe with the numbers of layers, and without joint sums that this config has not."""
    joint_sums = tuple(
        replace(joint, when=())
        for joint in recipe.joint_sums
        if all(read_field(config, field) == value for field, value in joint.when)
    )
    return number_layers(replace(recipe, joint_sums=joint_sums), config)


def _counts_heads(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in HEADS)


def list_alternatives(pattern: str) -> tuple[str, ...]:
    """The names that a pattern of one `{a,b}`, or of none, stands for.

    Example:
        >>> list_alternatives("{model.,}visual")
        ('model.visual', 'visual')
    """
    head, brace, rest = pattern.partition("{")
    if not brace:
        return (pattern,)
    words, _, tail = rest.partition("}")
    return tuple(f"{head}{word}{tail}" for word in words.split(","))


def _make_optional(patterns: list[str]) -> str:
    """A pattern of any of these modules and a dot, or of nothing."""
    names = [name for pattern in patterns for name in list_alternatives(pattern)]
    return f"{{{''.join(f'{name}.,' for name in names)}}}"
