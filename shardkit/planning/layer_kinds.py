"""The lists of modules that tensors are in, and which modules of a list are of one kind."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.planning.placement import Placement

# The tensors of each module of a list, by its number, and by their names within the module.
Layers = Mapping[int, Mapping[str, Placement]]

INNER_NUMBER = re.compile(r"(?<=[^.])\.(\d{1,9})(?=\.)")  # a module's number in its list


def group_tensors(tensors: Mapping[str, Placement]) -> dict[str, dict[int, dict[str, Placement]]]:
    """Every list of modules, by its name: the layers of a model, the experts of a layer.

    Args:
        tensors: Placements, by the tensors' names.
    """
    lists: dict[str, dict[int, dict[str, Placement]]] = {}
    for name, placement in tensors.items():
        for match in INNER_NUMBER.finditer(name):
            layers = lists.setdefault(name[: match.start()], {})
            layers.setdefault(int(match[1]), {})[name[match.end() + 1 :]] = placement
    return lists


def group_kinds(layers: Layers, config: Mapping[str, Any]) -> Iterator[Layers]:
    """The layers that a config tells no difference of, in groups.

    A list in a config may say something of each layer (`layer_types`), or number some of them.
    """
    tables = list(_iter_lists(config))
    kinds: dict[tuple[object, ...], dict[int, Mapping[str, Placement]]] = {}
    for at, layer in layers.items():
        kinds.setdefault(tuple(_describe_layer(table, at) for table in tables), {})[at] = layer
    yield from kinds.values()


def _describe_layer(table: list[Any], at: int) -> tuple[object, bool]:
    return (repr(table[at]) if at < len(table) else None, at in table)


def _iter_lists(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _iter_lists(inner)
    elif isinstance(value, list) and len(value) > 1:
        yield value
