"""Row-parallel modules whose outputs are added up before one sum over the ranks.

A sum of sums is the sum of all. If a model only adds what two modules output, attention and MLP in
parallel, or routed experts and a shared one, one all-reduce serves both.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from shardkit.errors import RecipeError
from shardkit.recipe.patterns import translate_pattern
from shardkit.recipe.toml_values import (
    check_conditions,
    check_pattern,
    expect_string,
    expect_strings,
    expect_table,
)

NESTED = r"(?:.*\.)?"  # wherever a model has the modules


@dataclass(frozen=True, slots=True)
class JointSum:
    """Modules of a layer whose outputs are summed over the ranks together.

    Attributes:
        module: A pattern of the modules that they are in: layers.
        of: Patterns, from there on, of those whose outputs are added up.
        at: A pattern of one of these, or of a module around some: the sum is of its output.
        when: Config fields and the values that they must have; none once a config is known.
    """

    module: str
    of: tuple[str, ...]
    at: str
    when: tuple[tuple[str, object], ...] = ()

    @property
    def pattern(self) -> re.Pattern[str]:
        """The summands' paths and those of what is in them: the module, and the summand in it."""
        module, of = translate_pattern(self.module), map(translate_pattern, self.of)
        return re.compile(rf"({NESTED}{module})\.({'|'.join(of)})(?:\..*)?")

    def match_place(self, path: str) -> bool:
        """Whether the sum is of the output of the module at a path, from `module` on."""
        return re.fullmatch(translate_pattern(self.at), path) is not None


def match_joint_sums(
    rules: Iterable[JointSum], paths: Iterable[str]
) -> Iterator[tuple[JointSum, str, set[str]]]:
    """For each module that has two summands or more, it and these, by the first rule that has them.

    Args:
        rules: The joint sums.
        paths: The paths of summands, or of what is in them.

    Example:
        >>> joint = JointSum("layers.*", ("attn.dense", "mlp.fc2"), "mlp.fc2")
        >>> [match] = match_joint_sums([joint], ["layers.0.attn.dense", "layers.0.mlp.fc2.weight"])
        >>> match[1], sorted(match[2])
        ('layers.0', ['attn.dense', 'mlp.fc2'])
    """
    rest = [*paths]
    for rule in rules:
        summands: dict[str, set[str]] = {}
        matches = [rule.pattern.fullmatch(path) for path in rest]
        for match in filter(None, matches):
            summands.setdefault(match[1], set()).add(match[2])
        layers = {module for module, names in summands.items() if len(names) > 1}
        yield from ((rule, module, summands[module]) for module in summands if module in layers)
        rest = [p for p, m in zip(rest, matches, strict=True) if m is None or m[1] not in layers]


def parse_joint_sums(table: dict[str, Any]) -> Iterator[JointSum]:
    """The entries of a recipe's `[joint_sums]`. Raises RecipeError that names the key."""
    for module, entry in table.items():
        for each in entry if isinstance(entry, list) else [entry]:
            yield _parse_joint_sum(check_pattern("joint_sums", module), each)


def _parse_joint_sum(module: str, entry: Any) -> JointSum:
    key = f"joint_sums.{module}"
    if not isinstance(entry, dict) or entry.keys() - {"when"} != {"of", "at"}:
        raise RecipeError(f"{key}: must be {{ of = [MODULE, …], at = MODULE }}, or a list of such")
    of, at = expect_strings(entry, "of"), expect_string(entry["at"], f"{key}.at")
    if len(of) < 2:
        raise RecipeError(f"{key}: of has {len(of)} modules, not two or more")
    for pattern in (*of, at):
        check_pattern(key, pattern)
    when = check_conditions(expect_table(entry, "when", f"{key}."), f"{key}.when")
    return JointSum(module, of, at, tuple(when.items()))
