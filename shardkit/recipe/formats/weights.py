"""Quantized weights of a checkpoint, in groups of those that are alike, and what stores them."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

from shardkit.recipe.formats.format import Scheme, StoredPart
from shardkit.tensor import AlikeTensors, TensorSpec, generalize_name


@dataclass(frozen=True, eq=False)
class WeightKind:
    """What alike weights have in common: each kind of a checkpoint is one object.

    Attributes:
        scheme: How they are quantized.
        shape: Their shape `[..., out, in]`.
        tensors: What is stored of each, the codes first.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    tensors: tuple[StoredPart, ...] = ()

    @cached_property
    def is_operand(self) -> tuple[bool, ...]:
        """Of each stored tensor, whether the weight is computed from it."""
        others = {id(other) for other in self.scheme.format.others}
        return tuple(id(tensor) not in others for tensor in self.tensors)

    @cached_property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape that they would have in 16 bits."""
        *lead, out, inputs = self.shape
        return (*lead, inputs, out) if self.scheme.format.transposed else self.shape


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One logical weight and what stores it.

    Attributes:
        name: What the weight would be called in 16 bits.
        kind: How it is quantized, and its shape.
        specs: Its stored tensors, the codes first.
    """

    name: str
    kind: WeightKind
    specs: tuple[TensorSpec, ...]

    @property
    def scheme(self) -> Scheme:
        """How it is quantized."""
        return self.kind.scheme

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape `[..., out, in]`."""
        return self.kind.shape

    @property
    def parts(self) -> tuple[tuple[StoredPart, TensorSpec], ...]:
        """What its format says of each stored tensor, and the tensor, the codes first."""
        return tuple(zip(self.kind.tensors, self.specs, strict=True))

    @property
    def operands(self) -> tuple[tuple[StoredPart, TensorSpec], ...]:
        """Those of its parts that it is computed from."""
        return tuple(compress(self.parts, self.kind.is_operand))

    @property
    def axes(self) -> tuple[str, str]:
        """What its last two dimensions are in 16 bits."""
        return ("in", "out") if self.scheme.format.transposed else ("out", "in")

    def make_spec(self, dtype: str) -> TensorSpec:
        """The tensor that it would be in 16 bits."""
        return TensorSpec(self.name, dtype, self.kind.plain_shape)

    @property
    def codes(self) -> TensorSpec:
        """The tensor that holds its elements."""
        return self.specs[0]


@dataclass(frozen=True, eq=False)
class AlikeWeights:
    """Quantized weights of one kind whose names differ by numbers only.

    Attributes:
        kind: How they are quantized, and their shape.
        names: What they would be called in 16 bits.
        parts: What is stored of them, one group for each of the kind's tensors, in the order of
            their names.
    """

    kind: WeightKind
    names: Sequence[str]
    parts: tuple[AlikeTensors, ...]

    @property
    def codes(self) -> AlikeTensors:
        """The tensors that hold their elements."""
        return self.parts[0]

    @property
    def first(self) -> QuantizedWeight:
        """The first of them."""
        specs = (part.first for part in self.parts)
        return QuantizedWeight(self.names[0], self.kind, tuple(specs))

    def list_weights(self) -> Iterator[QuantizedWeight]:
        """Each of them."""
        columns = [
            [TensorSpec(name, part.dtype, part.shape) for name in part.names] for part in self.parts
        ]
        for name, *specs in zip(self.names, *columns, strict=True):
            yield QuantizedWeight(name, self.kind, tuple(specs))

    def split_by(
        self, names: Sequence[str], find_key: Callable[[str], Hashable]
    ) -> Iterator["AlikeWeights"]:
        """They in groups, by a key of each one's name among these."""
        groups: dict[Hashable, list[int]] = {}
        for at, name in enumerate(names):
            groups.setdefault(find_key(name), []).append(at)
        if len(groups) == 1:
            yield self
            return
        for places in groups.values():
            names = [self.names[at] for at in places]
            parts = (part.with_names([part.names[at] for at in places]) for part in self.parts)
            yield AlikeWeights(self.kind, names, tuple(parts))

    def make_alike(self, dtype: str) -> AlikeTensors:
        """The tensors that they would be in 16 bits."""
        pattern = generalize_name(self.names[0])
        return AlikeTensors(pattern, dtype, self.kind.plain_shape, self.names)


@dataclass(frozen=True)
class Grouping:
    """A checkpoint's quantized weights.

    Attributes:
        alike: They, in groups.
        constants: Tensors that every rank holds and nothing is computed with, in groups.
    """

    alike: tuple[AlikeWeights, ...] = ()
    constants: tuple[AlikeTensors, ...] = ()

    @cached_property
    def weights(self) -> Mapping[str, QuantizedWeight]:
        """The weights, by the names of their codes."""
        every = (weight for each in self.alike for weight in each.list_weights())
        return {weight.codes.name: weight for weight in every}

    @cached_property
    def codes_by_part(self) -> Mapping[str, str]:
        """Of each stored tensor of theirs, the name of the codes."""
        return {
            name: codes
            for each in self.alike
            for part in each.parts
            for name, codes in zip(part.names, each.codes.names, strict=True)
        }

    @cached_property
    def constant_names(self) -> frozenset[str]:
        """The names of the constants."""
        return frozenset(name for each in self.constants for name in each.names)

    @cached_property
    def unused(self) -> frozenset[str]:
        """The stored tensors that nothing is computed with, and no rank keeps in memory."""
        others = (
            part.names
            for each in self.alike
            for part, is_operand in zip(each.parts, each.kind.is_operand, strict=True)
            if not is_operand
        )
        return self.constant_names.union(*others)

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes that some weight is of."""
        return tuple({id(each.kind.scheme): each.kind.scheme for each in self.alike}.values())

    def leave_plain(self, tensors: AlikeTensors) -> AlikeTensors | None:
        """Those tensors that are neither of a quantized weight nor constants; None for none."""
        if tensors not in self._plain:
            self._plain[tensors] = tensors.leave_out(self._known_names)
        return self._plain[tensors]

    @cached_property
    def _plain(self) -> dict[AlikeTensors, AlikeTensors | None]:
        return {}

    @cached_property
    def _known_names(self) -> frozenset[str]:
        parts = (part.names for each in self.alike for part in each.parts)
        return self.constant_names.union(*parts)
