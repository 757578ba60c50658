"""Which attributes and arguments of a region's modules count what is divided."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

from shardkit.authoring.draft.regions import ANY, Region
from shardkit.authoring.draft.tensor_origins import NUMBER, Small

NOT_COUNTS = ("head_dim", "layer_idx", "padding_idx")


@dataclass(frozen=True)
class Attribute:
    """An attribute of the modules a pattern names, and the unit or ratio it shrinks as."""

    module: str
    name: str
    text: str


@dataclass(frozen=True)
class Argument:
    """A forward argument of the modules a pattern names, which has all units along `dim`."""

    module: str
    name: str
    dim: int
    axis: str


def attributes_of(small: Small, region: Region) -> tuple[Attribute, ...]:
    """The integers that a region's modules read as they run, whose values say what they count."""
    texts = _texts(region)
    found = []
    for path in modules_of(small, region):
        module = small.model.get_submodule(path)
        for name in sorted(read_names(module.__class__) | {"num_key_value_groups"}):
            value = _value(module, name)
            if type(value) is not int or value < 2 or name.endswith(NOT_COUNTS):
                continue
            text = texts.get(value, "")
            if ("/" in text) == ("group" in name or "rep" in name) and text:
                found.append(Attribute(pattern_of(small, path), name, text))
    return tuple(dict.fromkeys(found))


def arguments_of(small: Small, region: Region) -> tuple[Argument, ...]:
    """The tensors that a region's modules are given that have a dimension of its units."""
    if region.unit.fields == (ANY,):
        return ()
    many, found = region.unit.value, []
    for path in modules_of(small, region):
        for name, shape in _given(small, path).items():
            for dim, length in enumerate(shape):
                if length in (many, 2 * many):
                    axis = region.unit.name if length == many else f"* {region.unit.name}"
                    found.append(Argument(pattern_of(small, path), name, dim, axis))
                    break
    return tuple(dict.fromkeys(found))


def modules_of(small: Small, region: Region) -> list[str]:
    """The modules around a region's own: those that hold its layers, or all of its columns."""
    columns = {axis.owner for axis in region.columns}
    owners = columns | {region.row.owner}
    common = _common([owner.split(".") for owner in columns])
    paths = {owner.rpartition(".")[0] for owner in owners} | {common}
    paths |= {o for o in owners if not _is_leaf_layer(small, o)}
    named = dict(small.model.named_modules())
    return sorted(path for path in paths if path in named and NUMBER.search(path))


def _common(paths: Sequence[Sequence[str]]) -> str:
    """The longest path that all of them begin with."""
    same = takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))
    return ".".join(words[0] for words in same)


def pattern_of(small: Small, path: str) -> str:
    """A module's path as a `[local]` pattern, which names it wherever the model nests it."""
    prefix = f"{small.model.base_model_prefix}."
    return NUMBER.sub("*", path.removeprefix(prefix) if prefix != "." else path)


@cache
def read_names(cls: type[Any]) -> frozenset[str]:
    """The attributes `self.x` and `self.config.x` that a class's methods read, but for building."""
    found: set[str] = set()
    for method in _methods(cls):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue  # made in memory: nothing to read
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                told = ast.unparse(node)
                parts = told.split(".")
                if parts[0] == "self" and (len(parts) == 2 or parts[1:2] == ["config"]):
                    found.add(".".join(parts[1:]))
    return frozenset(found)


def _methods(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and name not in ("__init__", "__post_init__"):
                yield inspect.unwrap(value)


def _texts(region: Region) -> dict[int, str]:
    """What an integer counts, by its value."""
    unit, shared = region.unit, region.shared
    texts: dict[int, str] = {}
    for axis in region.rules:
        if axis.text in (unit.name, shared.name if shared else unit.name):
            texts.setdefault(axis.length, axis.text)
    if unit.fields != (ANY,):
        texts[unit.value] = unit.name
    if shared:
        texts[shared.value] = shared.name
        texts.setdefault(unit.value // shared.value, f"{unit.name}/{shared.name}")
    return texts


def _value(module: Any, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(getattr(module, owner, None) if owner else module, last, None)


def _is_leaf_layer(small: Small, owner: str) -> bool:
    return not any(True for _ in small.model.get_submodule(owner).children()) and hasattr(
        small.model.get_submodule(owner), "weight"
    )


def _given(small: Small, path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors a module is given by name, at its first call."""
    import torch

    from shardkit.runtime.model_runner import no_cache_options
    from shardkit.verification.dummy_inputs import make_inputs

    found: list[dict[str, tuple[int, ...]]] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        found.append({k: tuple(v.shape) for k, v in kwargs.items() if torch.is_tensor(v)})

    module = small.model.get_submodule(path)
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        small.model(**make_inputs(small.model), **no_cache_options(small.model))
    handle.remove()
    return found[0] if found else {}
