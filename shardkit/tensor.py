"""A tensor as a file's header describes it, and which tensors are alike.

Work is done once for those that are alike: a mixture has 100,000 tensors, and 100 that differ.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

from shardkit.dtypes import DTYPES
from shardkit.errors import LayoutError

NUMBER = re.compile(r"\.\d{1,9}(?![^.\n])")
DtypeAndShape = tuple[str, tuple[int, ...]]  # what a tensor is but for its name


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor. Raises LayoutError if they do not end on a byte."""
        return count_bytes(math.prod(self.shape) * DTYPES[self.dtype].bits, self)


@dataclass(frozen=True, slots=True)
class ByteView:
    """A tensor's bytes around one of its dimensions: `[outer, axis, inner]`, `inner` in bytes."""

    outer: int
    axis: int
    inner: int

    @property
    def row(self) -> int:
        """The bytes of one outer index."""
        return self.axis * self.inner


def byte_view(spec: TensorSpec, dim: int | None) -> ByteView:
    """The tensor's bytes seen around `dim`; one undivided row if `dim` is None.

    Raises LayoutError if an index along `dim` is not a whole number of bytes (packed F4).
    """
    if dim is None:
        return ByteView(1, 1, spec.nbytes)
    bits = math.prod(spec.shape[dim + 1 :]) * DTYPES[spec.dtype].bits
    return ByteView(math.prod(spec.shape[:dim]), spec.shape[dim], count_bytes(bits, spec))


def count_bytes(bits: int, spec: TensorSpec) -> int:
    """`bits` in bytes. Raises LayoutError if they are not a whole number of bytes."""
    if bits % 8:
        raise LayoutError(f"{spec.name}: {bits} bits of {spec.dtype} do not end on a byte")
    return bits // 8


def generalize_name(name: str) -> str:
    """A name with `*` for each number that is a part of it.

    Example:
        >>> generalize_name("layers.3.experts.17.w1.weight")
        'layers.*.experts.*.w1.weight'
    """
    return NUMBER.sub(".*", f".{name}")[1:]  # to look for dots is twice as fast as to look behind


def generalize_names(names: Sequence[str]) -> list[str]:
    """As `generalize_name`, of names without line breaks, all at once."""
    if not names:
        return []
    return [name[1:] for name in NUMBER.sub(".*", "." + "\n.".join(names)).split("\n")]


@dataclass(frozen=True, eq=False, slots=True)
class AlikeTensors:
    """Tensors of one dtype and shape whose names differ by numbers only.

    Attributes:
        pattern: Their names, with `*` for each number.
        dtype: Their safetensors dtype.
        shape: Their shape.
        names: Their names, in order; at least one.
    """

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    names: Sequence[str]

    @property
    def first(self) -> TensorSpec:
        """The first of them."""
        return TensorSpec(self.names[0], self.dtype, self.shape)

    def with_names(self, names: Sequence[str]) -> "AlikeTensors":
        """Some of them."""
        return AlikeTensors(self.pattern, self.dtype, self.shape, names)

    def leave_out(self, names: AbstractSet[str]) -> "AlikeTensors | None":
        """Those of other names; None if there are none."""
        if names.isdisjoint(self.names):
            return self
        others = [name for name in self.names if name not in names]
        return self.with_names(others) if others else None

    def split_by(self, find_key: Callable[[str], Hashable]) -> Iterator["AlikeTensors"]:
        """They in groups, by a key of each name."""
        groups: dict[Hashable, list[str]] = {}
        for name in self.names:
            groups.setdefault(find_key(name), []).append(name)
        if len(groups) == 1:
            yield self
        else:
            yield from map(self.with_names, groups.values())


class TensorTable(Sequence[TensorSpec]):
    """The tensors of a checkpoint. Mixtures have 100,000 of them, and 100 that differ."""

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs: tuple[TensorSpec, ...] | None = tuple(specs)

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> "TensorTable":
        """The table of some tensors, itself if they are one."""
        return specs if isinstance(specs, cls) else cls(specs)

    @classmethod
    def of_columns(cls, names: Sequence[str], kinds: Iterable[DtypeAndShape]) -> "TensorTable":
        """The table of tensors of these names, dtypes and shapes."""
        table = cls(())
        table._specs, table.names, table._kinds = None, tuple(names), tuple(kinds)
        return table

    @classmethod
    def of_alike(cls, groups: Iterable[AlikeTensors]) -> "TensorTable":
        """The table of tensors that are grouped already, group by group."""
        table = cls(())
        table._specs, table.alike = None, tuple(groups)
        return table

    @overload
    def __getitem__(self, index: int) -> TensorSpec: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorSpec, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorSpec | tuple[TensorSpec, ...]:
        return self._list_specs()[index]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self._list_specs())

    def _list_specs(self) -> tuple[TensorSpec, ...]:
        if self._specs is None:
            kinds = self._kinds
            self._specs = tuple(
                TensorSpec(n, *kind) for n, kind in zip(self.names, kinds, strict=True)
            )
        return self._specs

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every name, in order."""
        if self._specs is None:
            return tuple(name for each in self.alike for name in each.names)
        return tuple(spec.name for spec in self._specs)

    @cached_property
    def _kinds(self) -> tuple[DtypeAndShape, ...]:
        if self._specs is None:
            return tuple((each.dtype, each.shape) for each in self.alike for _ in each.names)
        return tuple((spec.dtype, spec.shape) for spec in self._specs)

    @cached_property
    def alike(self) -> tuple[AlikeTensors, ...]:
        """The tensors in groups of those that are alike, in the order of their first."""
        groups: dict[tuple[str, DtypeAndShape], list[str]] = {}
        for key, name in zip(
            zip(generalize_names(self.names), self._kinds, strict=True), self.names, strict=True
        ):
            if (names := groups.get(key)) is None:
                groups[key] = names = []
            names.append(name)
        return tuple(AlikeTensors(p, *kind, names) for (p, kind), names in groups.items())

    @cached_property
    def names_by_pattern(self) -> dict[str, list[str]]:
        """The names of each pattern."""
        groups: dict[str, list[str]] = {}
        for each in self.alike:
            groups.setdefault(each.pattern, []).extend(each.names)
        return groups

    @property
    def examples(self) -> tuple[TensorSpec, ...]:
        """The first tensor of each group: every dtype, shape and pattern is there."""
        return tuple(each.first for each in self.alike)

    @property
    def nbytes(self) -> int:
        """The bytes of all."""
        return sum(len(each.names) * each.first.nbytes for each in self.alike)

    def without_prefix(self, prefix: str) -> "TensorTable":
        """The same tensors, the prefix left out of those names that have it."""
        if not prefix:
            return self
        plain = (replace(spec, name=spec.name.removeprefix(prefix)) for spec in self)
        return TensorTable(plain)
