"""Every tensor's placement, kept by groups of those that are alike."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from shardkit.planning.placement import Layout, Placement
from shardkit.tensor import AlikeTensors, TensorSpec, TensorTable, generalize_name

GroupKey = tuple[str, str, tuple[int, ...], Layout]  # pattern, dtype, shape and layout


@dataclass(frozen=True, eq=False, slots=True)
class PlacementGroup:
    """Alike tensors of one layout."""

    tensors: AlikeTensors
    layout: Layout

    @property
    def first(self) -> Placement:
        """The placement of the first."""
        return Placement(self.tensors.first, self.layout)

    @property
    def path(self) -> list[str]:
        """Their names, cut at their dots, with `*` for numbers."""
        return self.tensors.pattern.split(".")

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.tensors.names)

    def list_placements(self) -> list[Placement]:
        """The placement of each."""
        dtype, shape = self.tensors.dtype, self.tensors.shape
        return [
            Placement(TensorSpec(name, dtype, shape), self.layout) for name in self.tensors.names
        ]


class PlacementTable(Sequence[Placement]):
    """Placements in the order of a source's files, made one by one only if they are asked for.

    It is equal to any sequence of the same placements.
    """

    def __init__(self, names: Sequence[str], groups: Iterable[PlacementGroup]) -> None:
        """Take groups that together have exactly these names."""
        self.names = names
        self._given = tuple(groups)

    @classmethod
    def of(cls, placements: Sequence[Placement]) -> "PlacementTable":
        """The table of some placements, itself if they are one."""
        if isinstance(placements, cls):
            return placements
        groups: dict[GroupKey, list[str]] = {}
        for p in placements:
            key = (generalize_name(p.spec.name), p.spec.dtype, p.spec.shape, p.layout)
            groups.setdefault(key, []).append(p.spec.name)
        return cls([p.spec.name for p in placements], _make_groups(groups))

    @cached_property
    def groups(self) -> tuple[PlacementGroup, ...]:
        """All that are alike and of one layout in one group, in the order of their first."""
        places = dict(zip(self.names, range(len(self.names)), strict=True))
        merged: dict[GroupKey, list[str]] = {}
        for group in self._given:
            tensors = group.tensors
            key = (tensors.pattern, tensors.dtype, tensors.shape, group.layout)
            merged.setdefault(key, []).extend(tensors.names)
        ordered = {key: sorted(n, key=places.__getitem__) for key, n in merged.items()}
        groups = _make_groups(ordered)
        return tuple(sorted(groups, key=lambda group: places[group.tensors.names[0]]))

    def list_tensors(self) -> TensorTable:
        """The tensors, in their groups."""
        return TensorTable.of_alike(group.tensors for group in self.groups)

    @overload
    def __getitem__(self, index: int) -> Placement: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Placement, ...]: ...
    def __getitem__(self, index: int | slice) -> Placement | tuple[Placement, ...]:
        return self._placements[index]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Placement]:
        return iter(self._placements)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._placements == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _placements(self) -> tuple[Placement, ...]:
        every = (p for group in self._given for p in group.list_placements())
        by_name = {p.spec.name: p for p in every}
        return tuple(map(by_name.__getitem__, self.names))


def _make_groups(names: Mapping[GroupKey, Sequence[str]]) -> Iterator[PlacementGroup]:
    for (pattern, dtype, shape, layout), same in names.items():
        yield PlacementGroup(AlikeTensors(pattern, dtype, shape, same), layout)
