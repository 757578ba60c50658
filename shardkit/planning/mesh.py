"""Which rank holds what: the three ways of dividing a model, and a rank's place in them."""

from collections.abc import Iterator
from dataclasses import dataclass

from shardkit.errors import LayoutError

MAX_TP_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks a model is divided over, in each of three ways.

    As torch's `DeviceMesh`, but without devices. The ranks that share every layer are also those
    that experts are distributed over, so `ep_size` adds none. Today `pp_size` is always 1.

    Attributes:
        tp_size: Tensor parallelism: the ranks that share every layer.
        ep_size: Expert parallelism: the groups that these ranks are in, each with experts of its
            own: 1 if all ranks share every expert, `tp_size` if each has whole ones.
        pp_size: Pipeline parallelism: the stages that hold different layers.

    Example:
        >>> [rank.tp_rank for rank in Mesh(4).ranks()]
        [0, 1, 2, 3]
    """

    tp_size: int
    ep_size: int = 1
    pp_size: int = 1

    @property
    def world_size(self) -> int:
        """How many ranks there are in all."""
        return self.tp_size * self.pp_size

    def rank(self, index: int) -> "Rank":
        """The rank of an index. Raises LayoutError if there is no such rank."""
        if not 0 <= index < self.world_size:
            raise LayoutError(f"rank {index}: there are ranks 0 to {self.world_size - 1}")
        return Rank(self, index)

    def ranks(self) -> Iterator["Rank"]:
        """Every rank, in the order of its index."""
        return (Rank(self, index) for index in range(self.world_size))

    def check(self) -> None:
        """Raise LayoutError if shardkit cannot divide a model over this mesh."""
        if not 1 <= self.tp_size <= MAX_TP_SIZE:
            raise LayoutError(f"tp_size {self.tp_size} is not 1 to {MAX_TP_SIZE}")
        if self.ep_size not in (1, self.tp_size):
            raise LayoutError(f"ep_size {self.ep_size} is neither 1 nor the tp_size {self.tp_size}")
        if self.pp_size != 1:
            raise LayoutError(f"pp_size {self.pp_size}: this shardkit divides over pp_size 1 only")


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a mesh; its index counts tp fastest, then pp, as torchrun's RANK."""

    mesh: Mesh
    index: int

    @property
    def tp_rank(self) -> int:
        """The place among the ranks that share every layer."""
        return self.index % self.mesh.tp_size

    @property
    def ep_rank(self) -> int:
        """The group of experts that it has."""
        return self.tp_rank * self.mesh.ep_size // self.mesh.tp_size

    @property
    def pp_rank(self) -> int:
        """The pipeline stage."""
        return self.index // self.mesh.tp_size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which stores what no other rank does."""
        return self.index == 0
