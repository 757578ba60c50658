"""Recipes: which tensors of a model family are column-, row- or vocab-parallel, as data.

`recipes/README.md` describes the format.  A recipe names tensors as they are on disk; only
`[local]` and `[arguments]`, which the runtime uses, name modules as transformers builds them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from shardkit.errors import RecipeError
from shardkit.layout.axis import Term

Style = Literal["column", "row", "vocab", "norm", "gather", "once", "replicate", "ignore"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How the tensors that `pattern` names are placed.

    `fan_in_fan_out` says that weights are stored `[in, out]` (Conv1D, Embedding) instead of `[out, in]`;
    `stated_dim` is the sharded dimension where it is neither.  `reason` says why something large is whole.
    """

    pattern: str
    style: Style
    terms: tuple[Term, ...] = ()
    fan_in_fan_out: bool = False
    stated_dim: int | None = None
    reason: str = ""

    def dim(self, ndim: int) -> int | None:
        """The sharded dimension of an `ndim`-dimensional tensor; None where a rank holds it whole.

        Counted from the end, so that stacked experts `[experts, out, in]` need no rule of their
        own.  A one-dimensional tensor of a row rule is a bias: whole, and added once after the sum.
        """
        if ndim == 0 or not self.terms:
            return None
        if self.stated_dim is not None:
            return min(self.stated_dim, ndim - 1)
        match self.style:
            case "column" | "norm":
                return ndim - 1 if self.fan_in_fan_out or ndim == 1 else ndim - 2
            case "row" if ndim > 1:
                return ndim - 2 if self.fan_in_fan_out else ndim - 1
            case "vocab":
                return 0
            case _:
                return None


@dataclass(frozen=True, slots=True)
class UnitRule:
    """Where a count comes from: the first of `fields` the config has; empty for any count.

    A field may be a ratio, `n_head / 4`.  `shared_by` names the unit that shares this one (query
    heads sharing kv heads).
    """

    fields: tuple[str, ...]
    shared_by: str = ""


@dataclass(frozen=True, slots=True)
class ModuleAttribute:
    """A module attribute that shrinks on a rank, as `unit` does, or as the ratio `times/per`.

    Of a list of modules, one for each unit, a rank keeps its own.  `unit` is a unit, or a tensor
    of the module (`conv1d.weight`) along whose divided dimension the attribute is counted.
    """

    module: str
    attribute: str
    unit: str
    per_unit: str = ""

    @property
    def by_tensor(self) -> bool:
        """Whether `unit` names a tensor; no unit's name has a dot."""
        return "." in self.unit


@dataclass(frozen=True, slots=True)
class ForwardArgument:
    """A forward argument of which a rank's module sees only its own units, along `dim`.

    `outer` is set where other axes lie before the unit's in the same dimension, as `[batch heads]`.
    """

    module: str
    argument: str
    dim: int
    unit: str
    outer: bool = False


@dataclass(frozen=True)
class Recipe:
    """One model family's layouts.  `sha256` is the digest of the file it was read from."""

    name: str
    sha256: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    units: Mapping[str, UnitRule] = field(default_factory=dict)
    counts: Mapping[str, UnitRule] = field(default_factory=dict)
    when: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    module_attributes: tuple[ModuleAttribute, ...] = ()
    forward_arguments: tuple[ForwardArgument, ...] = ()
    base_model_prefix: str = ""
    notes: str = ""

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(compile_tensor_pattern(r.pattern, self.base_model_prefix), r) for r in self.rules]

    def rule_for(self, tensor: str) -> Rule:
        """The one rule that names `tensor`.  Raises RecipeError where none does, or two do."""
        found = [rule for pattern, rule in self._compiled if pattern.fullmatch(tensor)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise RecipeError(
                f"{tensor}: no rule of recipe {self.name!r} names this tensor, and none is guessed;"
                " add a rule to the recipe, or pass another with --recipe"
            )
        names = " and ".join(repr(rule.pattern) for rule in found)
        raise RecipeError(f"{tensor}: {len(found)} rules of recipe {self.name!r} name it: {names}")


def compile_tensor_pattern(pattern: str, base_model_prefix: str = "") -> re.Pattern[str]:
    """The tensors a recipe pattern names: a module's weight and bias, or exactly that tensor.

    A name may lack the base model's prefix, itself a pattern, as checkpoints saved from the base
    model do, and old checkpoints call the weight and bias of a norm gamma and beta.
    """
    head = ""
    if base_model_prefix and pattern.startswith(base_model_prefix + "."):
        head = rf"(?:{_translate_pattern(base_model_prefix)}\.)?"
        pattern = pattern[len(base_model_prefix) + 1 :]
    return re.compile(head + _translate_pattern(pattern) + r"(?:\.(?:weight|bias|gamma|beta))?")


def compile_module_pattern(pattern: str) -> re.Pattern[str]:
    """The modules a `[local]` or `[arguments]` pattern names, wherever the model nests them."""
    return re.compile(r"(?:.*\.)?" + _translate_pattern(pattern.removesuffix("?")))


def _translate_pattern(pattern: str) -> str:
    """`*` is one number and `{a,b}` is either; everything else stands for itself.

    `*` is itself too: transformers 5 saves such a name where it undoes a renaming by pattern.
    """
    parts = re.split(r"(\*|\{[^{}]*\})", pattern)
    return "".join(
        r"(?:\d+|\*)"
        if part == "*"
        else "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
        if part.startswith("{")
        else re.escape(part)
        for part in parts
    )
