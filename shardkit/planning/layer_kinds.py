"""The lists of modules that tensors are in, and which modules of a list are of one kind."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardkit.planning.placement_table import PlacementGroup

# The tensors of each module of a list, by its number, and by their names within the module.
Layers = Mapping[int, Mapping[str, PlacementGroup]]

INNER_NUMBER = re.compile(r"(?<=[^.])\.(\d{1,9})(?=\.)")  # a module's number in its list


def group_tensors(
    groups: Iterable[PlacementGroup],
) -> Mapping[str, Mapping[int, Mapping[str, PlacementGroup]]]:
    """Every list of modules, by its name: the layers of a model, the experts of a layer."""
    lists: dict[str, dict[int, dict[str, PlacementGroup]]] = defaultdict(lambda: defaultdict(dict))
    for group in groups:
        for name in group.tensors.names:
            for match in INNER_NUMBER.finditer(name):
                start, stop = match.span()
                lists[name[:start]][int(match[1])][name[stop + 1 :]] = group
    return lists


class LayerKinds:
    """What a config says of each layer.

    A list in a config may say something of each layer (`layer_types`), or number some of them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._lists = list(_iter_lists(config))
        self._known: dict[int, tuple[object, ...]] = {}

    def group_layers(self, layers: Layers) -> list[Layers]:
        """The layers that the config tells no difference of, in groups."""
        kinds: dict[tuple[object, ...], dict[int, Mapping[str, PlacementGroup]]] = {}
        for at, layer in layers.items():
            if (kind := self._known.get(at)) is None:
                kind = tuple(_describe_layer(each, at) for each in self._lists)
                self._known[at] = kind
            kinds.setdefault(kind, {})[at] = layer
        return [*kinds.values()]


def _describe_layer(table: list[Any], at: int) -> tuple[object, bool]:
    return (repr(table[at]) if at < len(table) else None, at in table)


def _iter_lists(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _iter_lists(inner)
    elif isinstance(value, list) and len(value) > 1:
        yield value
