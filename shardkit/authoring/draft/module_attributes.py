"""Which attributes and forward arguments of a region's modules count what is divided."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

from shardkit.authoring.draft.regions import ParallelRegion
from shardkit.authoring.draft.tensor_origins import NUMBER, LoadedModel, star_numbers

NO_COUNTS = ("head_dim", "layer_idx", "padding_idx")


@dataclass(frozen=True)
class DraftAttribute:
    """An attribute of the modules a pattern names, and the unit or ratio it shrinks with."""

    module: str
    name: str
    unit: str


@dataclass(frozen=True)
class DraftArgument:
    """A forward argument of the modules a pattern names, which holds all units along `dim`."""

    module: str
    name: str
    dim: int
    axis: str


def find_attributes(loaded: LoadedModel, region: ParallelRegion) -> tuple[DraftAttribute, ...]:
    """The integers that a region's modules read as they run and whose values are its counts."""
    names = _unit_names(region)
    attributes = []
    for path in list_modules(loaded, region):
        module = loaded.model.get_submodule(path)
        for name in sorted(list_read_attributes(module.__class__) | {"num_key_value_groups"}):
            value = _read_attribute(module, name)
            if type(value) is not int or value < 2 or name.endswith(NO_COUNTS):
                continue
            unit = names.get(value, "")
            if unit and ("/" in unit) == ("group" in name or "rep" in name):
                attributes.append(DraftAttribute(module_pattern(loaded, path), name, unit))
    return tuple(dict.fromkeys(attributes))


def find_arguments(loaded: LoadedModel, region: ParallelRegion) -> tuple[DraftArgument, ...]:
    """The tensor arguments of a region's modules that have a dimension of its units."""
    if region.unit.is_any:
        return ()
    count, arguments = region.unit.value, []
    for path in list_modules(loaded, region):
        for name, shape in _argument_shapes(loaded, path).items():
            for dim, length in enumerate(shape):
                if length in (count, 2 * count):
                    axis = region.unit.name if length == count else f"* {region.unit.name}"
                    pattern = module_pattern(loaded, path)
                    arguments.append(DraftArgument(pattern, name, dim, axis))
                    break
    return tuple(dict.fromkeys(arguments))


def list_modules(loaded: LoadedModel, region: ParallelRegion) -> list[str]:
    """The modules around a region: those that hold its layers, and the one around its columns."""
    columns = {rule.owner for rule in region.columns}
    owners = columns | {region.row.owner}
    paths = {owner.rpartition(".")[0] for owner in owners}
    paths.add(_common_path([owner.split(".") for owner in columns]))
    paths |= {owner for owner in owners if not _is_plain_layer(loaded, owner)}
    existing = dict(loaded.model.named_modules())
    return sorted(path for path in paths if path in existing and NUMBER.search(path))


def module_pattern(loaded: LoadedModel, path: str) -> str:
    """A module's path as a recipe pattern, which names it wherever the model nests it."""
    prefix = f"{loaded.model.base_model_prefix}."
    return star_numbers(path.removeprefix(prefix) if prefix != "." else path)


@cache
def list_read_attributes(cls: type) -> frozenset[str]:
    """The attributes `self.x` and `self.config.x` that a class reads outside of its constructor."""
    names: set[str] = set()
    for method in _list_methods(cls):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue  # made in memory: it has no source
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner, *path = ast.unparse(node).split(".")
                if owner == "self" and (len(path) == 1 or path[:1] == ["config"]):
                    names.add(".".join(path))
    return frozenset(names)


def _list_methods(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and name not in ("__init__", "__post_init__"):
                yield inspect.unwrap(value)


def _common_path(paths: Sequence[Sequence[str]]) -> str:
    """The longest path that all of them begin with."""
    same = takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))
    return ".".join(words[0] for words in same)


def _unit_names(region: ParallelRegion) -> dict[int, str]:
    """What an integer counts, by its value in the tiny model."""
    unit, shared = region.unit, region.shared
    names: dict[int, str] = {}
    for rule in region.rules:
        if rule.axis in (unit.name, shared.name if shared else unit.name):
            names.setdefault(rule.length, rule.axis)
    if not unit.is_any:
        names[unit.value] = unit.name
    if shared:
        names[shared.value] = shared.name
        names.setdefault(unit.value // shared.value, f"{unit.name}/{shared.name}")
    return names


def _read_attribute(module: Any, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(getattr(module, owner, None) if owner else module, last, None)


def _is_plain_layer(loaded: LoadedModel, owner: str) -> bool:
    """Whether a module is a layer of its own: with a weight, and without modules inside."""
    module = loaded.model.get_submodule(owner)
    return not any(True for _ in module.children()) and hasattr(module, "weight")


def _argument_shapes(loaded: LoadedModel, path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a module is given by name, at its first call."""
    import torch

    from shardkit.authoring.hooks import run_with_hooks

    calls: list[dict[str, tuple[int, ...]]] = []

    def keep_shapes(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        tensors = {name: value for name, value in kwargs.items() if torch.is_tensor(value)}
        calls.append({name: tuple(value.shape) for name, value in tensors.items()})

    with torch.inference_mode():
        run_with_hooks(loaded.model, [(path, keep_shapes)], with_kwargs=True)
    return calls[0] if calls else {}
