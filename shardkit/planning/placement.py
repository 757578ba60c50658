"""Where one tensor lies on every rank."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from shardkit.config_fields import EXPERT_PREFIX
from shardkit.layout import (
    Cover,
    Section,
    Span,
    Style,
    Tile,
    cover_axis,
    cover_spans,
    num_indices,
    partition,
    rank_spans,
)
from shardkit.planning.mesh import Mesh, Rank
from shardkit.tensor import TensorSpec, byte_view


@dataclass(frozen=True, slots=True)
class Expert:
    """One of a stack of experts whose tensors are stored one by one.

    Attributes:
        number: Which one.
        count: How many the stack has.
    """

    number: int
    count: int

    @property
    def module_names(self) -> tuple[str, str]:
        """What a module of this expert alone may be called in its stack."""
        return str(self.number), f"{EXPERT_PREFIX}{self.number}"

    def is_on(self, rank: Rank) -> bool:
        """Whether a rank has it, of a mesh in which each has whole experts."""
        return self.number in partition(self.count, rank.ep_rank, rank.mesh.ep_size)


@dataclass(frozen=True)
class Layout:
    """How ranks share a tensor, and all that are like it.

    Attributes:
        style: How ranks share it.
        dim: The dimension that is divided; None if none is.
        sections: What `dim` holds. If the style gathers inputs, what the input's last dimension
            holds, though the tensor itself is replicated.
        in_model: Whether the model's class has a place for it.
        units: The names of the units that its rule divides; none if it is read from a manifest.
        expert: The expert that the whole tensor is of, if each rank has whole ones.
        index_size: How many indices of the sections one index of `dim` stands for, if the tensor is
            part of a quantized weight.
        block_size: How many indices of the sections are stored together: a rank stores the whole
            of each block that it has a part of.
    """

    style: Style
    dim: int | None = None
    sections: tuple[Section, ...] = ()
    in_model: bool = True
    units: tuple[str, ...] = field(default=(), compare=False)
    expert: Expert | None = None
    index_size: int = 1
    block_size: int = 1

    @cached_property
    def _hash(self) -> int:
        sizes = self.index_size, self.block_size
        return hash((self.style.name, self.dim, self.sections, self.in_model, self.expert, sizes))

    @property
    def is_loaded(self) -> bool:
        """Whether a rank loads such a tensor; what is not loaded is stored for a merge."""
        return self.style.is_loaded and self.in_model

    def cover(self, rank: Rank) -> tuple[Cover, ...]:
        """The whole blocks of the sections that a rank stores. Raises LayoutError."""
        spans = rank_spans(self.sections, rank.tp_rank, rank.mesh.tp_size)
        return cover_spans(spans, self.block_size, sum(map(len, self.sections)))

    def __hash__(self) -> int:
        return self._hash  # once for the ten thousand tensors that have one layout


@dataclass(frozen=True, slots=True)
class Placement:
    """One tensor's layout, over any mesh: the properties are the layout's."""

    spec: TensorSpec
    layout: Layout

    @property
    def style(self) -> Style:
        """How ranks share it."""
        return self.layout.style

    @property
    def dim(self) -> int | None:
        """The dimension that is divided; None if none is."""
        return self.layout.dim

    @property
    def sections(self) -> tuple[Section, ...]:
        """What that dimension, or if inputs are gathered the input's last one, holds."""
        return self.layout.sections

    @property
    def in_model(self) -> bool:
        """Whether the model's class has a place for it."""
        return self.layout.in_model

    @property
    def units(self) -> tuple[str, ...]:
        """The names of the units that its rule divides."""
        return self.layout.units

    @property
    def expert(self) -> Expert | None:
        """The expert that the whole tensor is of, if each rank has whole ones."""
        return self.layout.expert

    @property
    def is_loaded(self) -> bool:
        """Whether a rank loads it; what is not loaded is stored for a merge."""
        return self.layout.is_loaded

    def spans(self, rank: Rank) -> tuple[Span, ...]:
        """The spans of `dim` that a rank holds; of one undivided row if `dim` is None."""
        if self.dim is not None:
            size = self.layout.index_size
            covers = self.layout.cover(rank)
            return tuple(Span(start // size, -(-stop // size)) for start, stop, _ in covers)
        if self.expert is not None:
            return (Span(0, 1),) if self.expert.is_on(rank) else ()
        return (Span(0, 1),) if self.is_loaded or rank.is_first else ()

    def section_lengths(self, rank: Rank) -> tuple[int, ...]:
        """How much of each section of `dim` a rank holds; empty if nothing is divided."""
        if self.dim is None:
            return ()
        parts = (rank_spans((s,), rank.tp_rank, rank.mesh.tp_size) for s in self.sections)
        return tuple(map(num_indices, parts))

    def shard_spec(self, rank: Rank) -> TensorSpec | None:
        """What a rank stores under the tensor's name; None if it stores nothing."""
        spans = self.spans(rank)
        if self.dim is None:
            return self.spec if spans else None
        shape = list(self.spec.shape)
        shape[self.dim] = num_indices(spans)
        return replace(self.spec, shape=tuple(shape))

    def destinations(self, mesh: Mesh) -> tuple[tuple[int, tuple[Span, ...]], ...]:
        """The ranks that store a part of it, by index, and the spans that each stores."""
        parts = ((rank.index, self.spans(rank)) for rank in mesh.ranks())
        return tuple((index, spans) for index, spans in parts if spans or self.dim is not None)

    def tiles(self, mesh: Mesh) -> tuple[Tile, ...]:
        """The divided dimension in order, each stretch from the first rank that holds it."""
        by_rank = [self.spans(rank) for rank in mesh.ranks()]
        return cover_axis(by_rank, byte_view(self.spec, self.dim).axis)
