"""Recipes: which tensors of a model family are column-, row- or vocab-parallel, as data.

`recipes/README.md` describes the format. A recipe names tensors as they are on disk; only
`[module_attributes]`, `[forward_arguments]` and `[joint_sums]`, which the runtime uses, name
modules as transformers builds them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardkit.config_fields import EXPERTS_MODULE
from shardkit.errors import RecipeError
from shardkit.layout import Style, Term
from shardkit.recipe.joint_sums import JointSum
from shardkit.recipe.patterns import (
    compile_experts_pattern,
    compile_tensor_pattern,
    rename_tensor,
)
from shardkit.tensor import AlikeTensors, generalize_name

EXPERTS = (EXPERTS_MODULE,)  # what nearly every model calls the module
NUMBER = re.compile(r"(?<![^.])(\d{1,9})(?![^.])")  # a part of a name that is one
STATED_NUMBER = re.compile(r"(?<![^.,{])\d+(?![^.,}])")  # a part of a pattern that is one


@dataclass(frozen=True, slots=True)
class Rule:
    """How the tensors that `pattern` names are placed.

    Attributes:
        pattern: A module, or a tensor of exactly that name.
        style: How ranks share it.
        terms: What the divided dimension holds; empty if the style divides nothing.
        fan_in_fan_out: Whether weights are stored `[in, out]` (Conv1D, Embedding) instead of
            `[out, in]`. The word is PEFT's.
        stated_dim: The divided dimension if it is neither of those.
        whole: A count. Of the last two dimensions, the one that is so long is not divided, for a
            weight that some checkpoints store transposed.
        reason: Why something large is replicated.
        template: The pattern as the recipe has it, if it names layers by their kind and `pattern`
            by their numbers.
    """

    pattern: str
    style: Style
    terms: tuple[Term, ...] = ()
    fan_in_fan_out: bool = False
    stated_dim: int | None = None
    whole: str = ""
    reason: str = ""
    template: str = ""

    @property
    def stated_pattern(self) -> str:
        """The pattern as the recipe has it."""
        return self.template or self.pattern

    def dim(self, shape: Sequence[int], counts: Mapping[str, int]) -> int | None:
        """The divided dimension of a tensor of this shape; None if it is not divided."""
        ndim = len(shape)
        if self.stated_dim is not None and ndim:
            return min(self.stated_dim, ndim - 1)
        dim = self.style.dim(ndim, self.fan_in_fan_out)
        if dim is None or not self.whole or ndim < 2:
            return dim
        other = 2 * ndim - 3 - dim  # the other one of the last two
        size = counts.get(self.whole)
        return other if shape[dim] == size != shape[other] else dim


@dataclass(frozen=True, slots=True)
class UnitRule:
    """Where a count comes from.

    Attributes:
        fields: The config fields of which the first that is there counts; a field may be a ratio,
            `n_head / 4`. Empty for as many units as the axis is long.
        shared_by: The unit that shares this one (query heads sharing kv heads).
        block: How many stay together, if there are as many such blocks as ranks.
    """

    fields: tuple[str, ...]
    shared_by: str = ""
    block: int = 1


@dataclass(frozen=True, slots=True)
class ModuleAttribute:
    """A module attribute that is smaller on a rank, as its unit is, or as a ratio of two units.

    Of a list of modules, one for each unit, a rank keeps its own.

    Attributes:
        module: A pattern of modules.
        attribute: The attribute's name.
        unit: A unit, or a tensor of the module (`conv1d.weight`) along whose divided dimension the
            attribute is counted.
        per_unit: The unit that divides it, if it is a ratio.
    """

    module: str
    attribute: str
    unit: str
    per_unit: str = ""

    @property
    def is_counted_by_tensor(self) -> bool:
        """Whether `unit` names a tensor; a unit's name has no dot."""
        return "." in self.unit


@dataclass(frozen=True, slots=True)
class ForwardArgument:
    """A forward argument of which a rank's module gets only its own units.

    Attributes:
        module: A pattern of modules.
        argument: The argument's name.
        dim: The dimension that the units lie along.
        unit: The unit.
        outer: Whether other axes lie before the unit's in the same dimension: `[batch heads]`.
    """

    module: str
    argument: str
    dim: int
    unit: str
    outer: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside of another, which has a recipe of its own.

    Attributes:
        config_field: The field of the outer config that holds the part's config.
        module: A pattern of the module, or modules, that the part is under on disk; its first
            alternative is the module's name in transformers' model.
        recipe: The name of its recipe; empty for the one of its config's `model_type`.
    """

    config_field: str
    module: str
    recipe: str = ""


@dataclass(frozen=True)
class Recipe:
    """One model family's layouts. `sha256` is the digest of the file that it was read from.

    One with `parts` has its own rules only, until `compose_recipe` adds those of the parts. One
    that is `part_only` is of a model that no checkpoint holds alone. `prediction_layers` has the
    modules that predict further tokens, which transformers does not load, and for each the module
    whose rules count inside of it. `layer_kinds` has the kinds of layers that patterns name, and
    for each the config's lists that tell it, with the value there. `other_prefixes` are what some
    classes of the type have in place of `base_model_prefix`. `renames` are names of other classes'
    tensors, numbers as `*`, and what the first class has, which the rules know; by `other_renames`
    go names without a rule. `places` are modules that checkpoints may hold alone, without their
    names. `expert_modules` are patterns of the modules that hold a mixture's experts.
    """

    name: str
    sha256: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    units: Mapping[str, UnitRule] = field(default_factory=dict)
    counts: Mapping[str, UnitRule] = field(default_factory=dict)
    when: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    module_attributes: tuple[ModuleAttribute, ...] = ()
    forward_arguments: tuple[ForwardArgument, ...] = ()
    joint_sums: tuple[JointSum, ...] = ()
    parts: tuple[Part, ...] = ()
    part_only: bool = False
    prediction_layers: Mapping[str, str] = field(default_factory=dict)
    layer_kinds: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    base_model_prefix: str = ""
    other_prefixes: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    other_renames: Mapping[str, str] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    expert_modules: tuple[str, ...] = EXPERTS
    notes: str = ""

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Rule]]:
        prefixes = self.base_model_prefix, self.other_prefixes
        return [(compile_tensor_pattern(r.pattern, *prefixes), r) for r in self.rules]

    @cached_property
    def _stated_numbers(self) -> frozenset[str]:
        """The numbers that patterns state: a name with one of them may have its own rule."""
        patterns = [rule.pattern for rule in self.rules]
        texts = [*patterns, self.base_model_prefix, *self.other_prefixes, *self.prediction_layers]
        texts += self.prediction_layers.values()
        texts += [name for name in self.other_renames if "*" not in name]
        return frozenset(number for text in texts for number in STATED_NUMBER.findall(text))

    @cached_property
    def _stated_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\.(?:{'|'.join(sorted(self._stated_numbers))})\.")

    @cached_property
    def _rules_by_name(self) -> dict[str, list[Rule]]:
        return {}

    @cached_property
    def _experts_pattern(self) -> re.Pattern[str]:
        return compile_experts_pattern(self.expert_modules)

    def match_experts(self, name: str) -> re.Match[str] | None:
        """Whether a tensor or module lies in a mixture's experts: the `stack`, and the `number`."""
        return self._experts_pattern.fullmatch(name)

    def generalize(self, tensor: str) -> str:
        """A name with `*` for each of its numbers that no rule states: all its like have its rule.

        A mixture has tens of thousands of tensors and a few dozen such names.
        """
        stated = self._stated_numbers
        if not stated:
            return generalize_name(tensor)
        parts = NUMBER.split(tensor)  # every second one is a number
        parts[1::2] = [number if number in stated else "*" for number in parts[1::2]]
        return "".join(parts)

    def split_by_rule(self, tensors: AlikeTensors) -> Iterator[AlikeTensors]:
        """Alike tensors in groups, of each of which one rule names all."""
        if not self._stated_numbers:
            return iter([tensors])
        find = self._stated_pattern.search
        return tensors.split_by(lambda name: self.generalize(name) if find(f".{name}.") else "")

    def rules_for(self, tensor: str) -> list[Rule]:
        """Every rule that names `tensor`: one, if the recipe fits."""
        name = self.generalize(tensor)
        if (rules := self._rules_by_name.get(name)) is None:
            rules = self._rules_by_name[name] = self._match_rules(name)
        return rules

    def _match_rules(self, tensor: str) -> list[Rule]:
        first = rename_tensor(tensor, self.renames)
        if first != tensor and len(rules := self._match_patterns(first)) == 1:
            return rules
        if rules := self._match_patterns(tensor):
            return rules
        if rules := self._match_patterns(rename_tensor(tensor, self.other_renames)):
            return rules
        if module := self.find_prediction_module(tensor):
            tensor = f"{self.prediction_layers[module]}{tensor.removeprefix(module)}"
            return self._match_rules(tensor)
        inside = (self._match_patterns(f"{place}.{tensor}") for place in self.places)
        return next((rules for rules in inside if rules), [])

    def _match_patterns(self, tensor: str) -> list[Rule]:
        """The rules whose patterns name a tensor as it is, or else without a prefix."""
        rules = [rule for pattern, rule in self._compiled if pattern.fullmatch(tensor)]
        if len(rules) > 1:
            plain = [r for r in rules if compile_tensor_pattern(r.pattern).fullmatch(tensor)]
            return plain if len(plain) == 1 else rules
        return rules

    def find_prediction_module(self, tensor: str) -> str:
        """The module of `prediction_layers` that a tensor is in; empty if it is in none."""
        return next((m for m in self.prediction_layers if tensor.startswith(f"{m}.")), "")

    def rule_for(self, tensor: str) -> Rule:
        """The one rule that names `tensor`. Raises RecipeError if none does, or two do."""
        rules = self.rules_for(tensor)
        if len(rules) == 1:
            return rules[0]
        if not rules:
            raise RecipeError(
                f"{tensor}: no rule of recipe {self.name!r} names this tensor, and none is guessed"
            )
        names = " and ".join(repr(rule.pattern) for rule in rules)
        raise RecipeError(f"{tensor}: {len(rules)} rules of recipe {self.name!r} name it: {names}")
