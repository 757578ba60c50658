"""What to say of a tensor that a recipe has no rule for: what it is, and the way out that works."""

import re
from collections.abc import Sequence

from shardkit.checkpoint import describe_wrapper_mark
from shardkit.recipe import Recipe, is_bundled

MODULE_END = re.compile(r"\.(?:weight|bias)$")
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def describe_unknown_tensor(names: Sequence[str], recipe: Recipe, prefix: str = "") -> str:
    """One line on the first tensor without a rule; empty if each has one.

    Args:
        names: Every tensor of the checkpoint: others may tell better what was saved.
        recipe: The recipe.
        prefix: What wrappers put before every name, and recipes leave out.
    """
    plain = [name.removeprefix(prefix) for name in names]
    unknown = [name for name in plain if not recipe.rules_for(name)]
    if not unknown:
        return ""
    name = unknown[0]
    if mark := describe_wrapper_mark(unknown):
        return f"the checkpoint is not a plain model: {mark}"
    without = f" (recipes leave out the wrapper's {prefix!r})" if prefix else ""
    what = (
        f"{name}: no rule of recipe {recipe.name!r} names this tensor{without}, and none is guessed"
    )
    pattern = NUMBER.sub("*", MODULE_END.sub("", name))
    where, end = f"recipe {recipe.name!r}", ""
    if is_bundled(recipe):
        where = f"a copy of the recipe (`shardkit recipes show {recipe.name} > my.toml`)"
        end = ", and pass --recipe my.toml"
    if name.split(".")[0] not in _list_top_modules(recipe):
        return (
            f'{what}; if the model runs without it, as without a value head, add "{pattern}" to'
            f" `ignore` in {where}{end}"
        )
    return (
        f"{what}; in {where} give it a rule if transformers' class has it, or else add"
        f' "{pattern}" to `ignore`{end}'
    )


def _list_top_modules(recipe: Recipe) -> set[str]:
    """The first words of the names that a recipe knows, with and without the base model's."""
    patterns = [rule.pattern for rule in recipe.rules]
    prefix = f"{recipe.base_model_prefix}."
    patterns += [pattern.removeprefix(prefix) for pattern in patterns]
    words = (pattern.split(".")[0] for pattern in patterns)
    return {word for first in words for word in first.strip("{}").split(",")}
