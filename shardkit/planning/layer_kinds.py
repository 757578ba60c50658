"""The lists of modules that tensors are in, and which modules of a list are of one kind."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from shardkit.planning.placement_table import PlacementGroup

# The tensors of each module of a list, by its number, and by their names within the module.
Layers = Mapping[int, Mapping[str, PlacementGroup]]

INNER_NUMBER = re.compile(r"(?<=[^.])\.(\d{1,9})(?=\.)")  # a module's number in its list
INNERMOST_LIST = re.compile(r".*[^.]\.\*(?=\.)")  # of a pattern, with the number
Numbers = Sequence[tuple[str, ...]]


def group_tensors(
    groups: Iterable[PlacementGroup],
) -> Mapping[str, Mapping[int, Mapping[str, PlacementGroup]]]:
    """Every list of modules, by its name: the layers of a model, the experts of a layer.

    Of lists within lists that lack nothing, such as experts, one of each is there and all of one:
    a mixture has tens of thousands of names, and nothing more could be seen in them.
    """
    lists: dict[str, dict[int, dict[str, PlacementGroup]]] = defaultdict(lambda: defaultdict(dict))
    by_list: dict[str, list[PlacementGroup]] = defaultdict(list)
    for group in groups:
        match = INNERMOST_LIST.match(group.tensors.pattern)
        by_list[match[0] if match else ""].append(group)
    for path, members in by_list.items():
        for group, names, depth in _list_telling(path, members):
            for name in names:
                for number in islice(INNER_NUMBER.finditer(name), depth, None):
                    start, stop = number.span()
                    lists[name[:start]][int(number[1])][name[stop + 1 :]] = group
    return lists


def _list_telling(
    path: str, groups: Sequence[PlacementGroup]
) -> Iterator[tuple[PlacementGroup, Sequence[str], int]]:
    """The groups of an innermost list, and of each the names that may tell of one that is missing.

    If the list is the same in each that it is in, and every module has the same tensors, these are
    the first module of each, and for the list itself all modules of the first: with the names comes
    how many of the lists that they are in are not meant.
    """
    depth = path.count("*")
    numbers = [_list_numbers(group) for group in groups] if depth > 1 else []
    first = _find_first(groups, numbers, depth) if numbers else None
    for at, group in enumerate(groups):
        names = group.tensors.names
        if first is None:
            yield group, names, 0
            continue
        rows, (*outer, last) = numbers[at], first
        yield group, [n for n, r in zip(names, rows, strict=True) if r[depth - 1] == last], 0
        of_first = [n for n, r in zip(names, rows, strict=True) if [*r[: depth - 1]] == outer]
        yield group, of_first, depth - 1


def _list_numbers(group: PlacementGroup) -> Numbers:
    """The numbers in each name."""
    pattern = re.escape(group.tensors.pattern).replace(r"\*", r"(\d+)")
    numbers: Numbers = re.findall(f"^{pattern}$", "\n".join(group.tensors.names), re.MULTILINE)
    return numbers


def _find_first(
    groups: Sequence[PlacementGroup], numbers: Sequence[Numbers], depth: int
) -> tuple[str, ...] | None:
    """A module's numbers, if every combination of those there are is there with every tensor."""
    by_pattern: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for group, rows in zip(groups, numbers, strict=True):
        by_pattern[group.tensors.pattern] += rows
    grids = []
    for rows in by_pattern.values():
        axes = [set(axis) for axis in zip(*rows, strict=True)]
        if math.prod(map(len, axes)) != len(rows):
            return None
        grids.append(axes[:depth])
    if any(grid != grids[0] for grid in grids):
        return None
    return tuple(map(min, grids[0]))


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
