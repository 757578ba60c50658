"""Patterns of a recipe: which tensors and modules they name."""

import re
from collections.abc import Iterable, Mapping

from shardkit.config_fields import EXPERT_PREFIX


def rename_tensor(tensor: str, renames: Mapping[str, str]) -> str:
    """A tensor's name after renaming; numbers stay, in their order.

    Example:
        >>> rename_tensor("h.3.norm1.weight", {"h.*.norm1.weight": "blocks.*.norm0.weight"})
        'blocks.3.norm0.weight'
    """
    parts = tensor.split(".")
    numbers = [part for part in parts if part == "*" or part.isdecimal()]
    general = ".".join("*" if part.isdecimal() else part for part in parts)
    if tensor in renames and tensor != general:
        return renames[tensor]
    given = iter(numbers)
    return ".".join(
        next(given, part) if part == "*" else part
        for part in renames.get(general, tensor).split(".")
    )


def compile_tensor_pattern(
    pattern: str, base_model_prefix: str = "", other_prefixes: Iterable[str] = ()
) -> re.Pattern[str]:
    """The tensors a recipe pattern names: a module's weight and bias, or exactly that tensor.

    A name may lack the base model's prefix, itself a pattern, as checkpoints saved from the base
    model do, or have another in its place. Old checkpoints call the weight and bias of a norm gamma
    and beta.
    """
    words, brace, rest = pattern.partition("}")
    forms = [pattern]
    if brace and words.startswith("{") and not pattern.startswith(f"{base_model_prefix}."):
        forms = [word + rest for word in words[1:].split(",")]
    prefixes = (base_model_prefix, *other_prefixes)
    texts = dict.fromkeys(_translate_form(form, *prefixes) for form in forms)
    return re.compile(rf"(?:{'|'.join(texts)})(?:\.(?:weight|bias|gamma|beta))?")


def _translate_form(pattern: str, base_model_prefix: str, *other_prefixes: str) -> str:
    """A pattern as an expression, its prefix optional if it begins with the base model's."""
    prefixes = [*other_prefixes]
    if base_model_prefix and not pattern.startswith(base_model_prefix + "."):
        prefixes = []
    elif base_model_prefix:
        prefixes.append(base_model_prefix)
        pattern = pattern[len(base_model_prefix) + 1 :]
    head = rf"(?:(?:{'|'.join(map(translate_pattern, prefixes))})\.)?" if prefixes else ""
    return head + translate_pattern(pattern)


def compile_experts_pattern(patterns: Iterable[str]) -> re.Pattern[str]:
    """The tensors and modules inside of these modules of experts, wherever a model nests them.

    Its group `stack` is the module, and `number` the expert's if each has a module of its own.
    """
    modules = "|".join(map(translate_pattern, patterns))
    number = rf"(?:\.(?:{EXPERT_PREFIX})?(?P<number>\d{{1,9}})(?=\.))?"
    return re.compile(rf"(?P<stack>(?:.*\.)?(?:{modules})){number}(?:\..*)?")


def compile_module_pattern(pattern: str) -> re.Pattern[str]:
    """The modules that a pattern names, wherever the model nests them; a `?` at its end is left."""
    return re.compile(r"(?:.*\.)?" + translate_pattern(pattern.removesuffix("?")))


def translate_pattern(pattern: str) -> str:
    """A pattern as an expression: `*` is one number, `{a,b}` either, all else stands for itself.

    `*` is itself too: transformers 5 saves such a name if it undoes a renaming by pattern.
    """
    return "".join(map(_translate_part, re.split(r"(\*(?:\[\w+\])?|\{[^{}]*\})", pattern)))


def _translate_part(part: str) -> str:
    if part.startswith("*"):  # of any kind, as long as no config tells which layers are of it
        return r"(?:\d+|\*)"
    if part.startswith("{"):
        return "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
    return re.escape(part)
