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

    def match_summands(self, paths: Iterable[str]) -> dict[str, set[str]]:
        """For each of the modules, which summands are among these paths, or around them.

        Example:
            >>> joint = JointSum("layers.*", ("attn.dense", "mlp.fc2"), "mlp.fc2")
            >>> joint.match_summands(["h.layers.0.attn.dense", "h.layers.0.mlp.fc1"])
            {'h.layers.0': {'attn.dense'}}
        """
        module, of = translate_pattern(self.module), map(translate_pattern, self.of)
        pattern = re.compile(rf"({NESTED}{module})\.({'|'.join(of)})(?:\..*)?")
        summands: dict[str, set[str]] = {}
        for match in filter(None, map(pattern.fullmatch, paths)):
            summands.setdefault(match[1], set()).add(match[2])
        return summands

    def match_place(self, path: str) -> bool:
        """Whether the sum is of the output of the module at a path, from `module` on."""
        return re.fullmatch(translate_pattern(self.at), path) is not None


def parse_joint_sums(table: dict[str, Any]) -> Iterator[JointSum]:
    """The entries of a recipe's `[joint_sums]`. Raises RecipeError that names the key."""
    for module in table:
        key = f"joint_sums.{module}"
        entry = expect_table(table, module, "joint_sums.")
        if entry.keys() - {"when"} != {"of", "at"}:
            raise RecipeError(f"{key}: must be {{ of = [MODULE, …], at = MODULE }}")
        of, at = expect_strings(entry, "of"), expect_string(entry["at"], f"{key}.at")
        if len(of) < 2:
            raise RecipeError(f"{key}: of has {len(of)} modules, not two or more")
        for pattern in (module, *of, at):
            check_pattern("joint_sums", pattern)
        when = check_conditions(expect_table(entry, "when", f"{key}."), f"{key}.when")
        yield JointSum(module, of, at, tuple(when.items()))
