"""The lists of modules that tensors are in, and which modules of a list are of one kind."""

from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.planning.placement import Placement

# The tensors of each module of a list, by its number, and by their names within the module.
Layers = Mapping[int, Mapping[str, Placement]]

MAX_DIGITS = 9


def group_tensors(tensors: Mapping[str, Placement]) -> dict[str, dict[int, dict[str, Placement]]]:
    """Every list of modules, by its name: the layers of a model, the experts of a layer.

    Args:
        tensors: Placements, by the tensors' names.
    """
    lists: dict[str, dict[int, dict[str, Placement]]] = {}
    for name, placement in tensors.items():
        parts = name.split(".")
        for at, part in enumerate(parts[:-1]):
            if at and part.isdecimal() and len(part) <= MAX_DIGITS:
                layers = lists.setdefault(".".join(parts[:at]), {})
                layers.setdefault(int(part), {})[".".join(parts[at + 1 :])] = placement
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
