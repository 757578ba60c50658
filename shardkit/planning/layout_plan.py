"""A plan: where every tensor lies on every rank, before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from shardkit.errors import LayoutError
from shardkit.layout import Section, Span, Unit, num_indices, rank_spans
from shardkit.layout.style import EXPERT
from shardkit.planning.mesh import MAX_TP_SIZE, Mesh, Rank
from shardkit.planning.placement import Placement
from shardkit.planning.placement_table import PlacementGroup, PlacementTable
from shardkit.planning.quantized import view_weights
from shardkit.recipe import ForwardArgument, JointSum, ModuleAttribute
from shardkit.recipe.formats import Grouping
from shardkit.tensor import byte_view


@dataclass(frozen=True)
class Plan:
    """Every tensor's placement over a mesh, and what else is smaller on a rank.

    Attributes:
        mesh: The ranks.
        placements: Every tensor's, in the order of the source's files.
        units: What is divided, counted.
        module_attributes: Attributes of the model's modules that count units.
        forward_arguments: Arguments of the model's modules that hold units.
        joint_sums: The model's modules whose outputs are summed over the ranks together.
        model_class: The class of transformers that the checkpoint is of; empty for the one that
            config.json names.
        wrapper_prefix: What training wrappers put before every tensor's name; empty if nothing.
        grouping: Which tensors are quantized weights.
    """

    mesh: Mesh
    placements: Sequence[Placement]
    units: Mapping[str, Unit]
    module_attributes: tuple[ModuleAttribute, ...] = ()
    forward_arguments: tuple[ForwardArgument, ...] = ()
    model_class: str = ""
    wrapper_prefix: str = ""
    grouping: Grouping = field(default_factory=Grouping)
    joint_sums: tuple[JointSum, ...] = ()

    @property
    def tp_size(self) -> int:
        """The number of tensor-parallel ranks."""
        return self.mesh.tp_size

    @cached_property
    def is_expert_parallel(self) -> bool:
        """Whether each rank has whole experts."""
        return any(group.layout.style is EXPERT for group in self.groups)

    def with_tp_size(self, tp_size: int) -> "Plan":
        """The same layout over another number of ranks: 1 for a merge. Raises LayoutError."""
        plan = replace(self, mesh=Mesh(tp_size, tp_size if self.is_expert_parallel else 1))
        plan.check()
        return plan

    def count_block(self, unit: str, count: int) -> int:
        """How many of a unit stay together if there are so many."""
        return self.units[unit].blocks.get(count, 1)

    def check(self) -> None:
        """Raise LayoutError, naming the tensor in the way, unless every rank can hold its part."""
        self.mesh.check()
        if self.mesh.ep_size != (self.tp_size if self.is_expert_parallel else 1):
            raise LayoutError(f"ep_size {self.mesh.ep_size}: is not that of the experts' layout")
        if self.tp_size > self.max_tp_size:
            raise LayoutError(self._describe_limit())
        for placement in (group.first for group in self.groups):
            byte_view(placement.spec, placement.dim)
            try:
                placement.tiles(self.mesh)
            except LayoutError as error:
                raise LayoutError(f"{placement.spec.name}: {error}") from None

    @cached_property
    def groups(self) -> tuple[PlacementGroup, ...]:
        """The placements in groups of those that are alike: experts by the thousand are one."""
        return PlacementTable.of(self.placements).groups

    @cached_property
    def weights(self) -> PlacementTable:
        """The placements of what the model is made of, a quantized weight as it is in 16 bits."""
        return self.list_weights()

    def list_weights(self) -> PlacementTable:
        """As `weights`. Raises LayoutError for a quantized weight that is cut in no axis of its."""
        placements = PlacementTable.of(self.placements)
        return view_weights(placements, self.grouping) if self.grouping.alike else placements

    @cached_property
    def loaded_groups(self) -> tuple[PlacementGroup, ...]:
        """The weights that the model loads, in groups of those that are alike."""
        return tuple(group for group in self.weights.groups if group.layout.is_loaded)

    @cached_property
    def max_tp_size(self) -> int:
        """The most ranks that each still hold a unit of everything that is divided."""
        limits = [
            section.max_tp_size
            for group in self.groups
            if group.layout.dim is not None
            for section in group.layout.sections
            if not section.replicated
        ]
        limits += {group.layout.expert.count for group in self.groups if group.layout.expert}
        return min(limits, default=MAX_TP_SIZE)

    def _describe_limit(self) -> str:
        """Why there are too many ranks: of which tensor there is not a unit for each."""
        most = self.max_tp_size
        for p in (group.first for group in self.groups):
            limits = {
                section.max_tp_size: self._describe_units(p, section)
                for section in (p.sections if p.dim is not None else ())
                if not section.replicated
            }
            if p.expert is not None:
                limits[p.expert.count] = f"{p.expert.count} experts"
            if most in limits:
                return (
                    f"{p.spec.name}: {limits[most]} cannot be divided over tp_size"
                    f" {self.tp_size}; this checkpoint divides over tp_size 1 to {most}"
                )
        return f"tp_size {self.tp_size} is not 1 to {most}"

    def _describe_units(self, placement: Placement, section: Section) -> str:
        """What a section is divided by: `8 heads`."""
        count = section.shared_by or section.units
        return f"{count} {self.name_unit(placement, count, 0)}"

    def name_unit(self, placement: Placement, count: int, shared_by: int) -> str:
        """What the recipe calls a unit of a tensor, told by its counts; else just units."""
        if placement.style is EXPERT:
            return "experts"
        counts = (count, shared_by)
        exact = [
            name for name, unit in self.units.items() if (unit.count, unit.shared_by) == counts
        ]
        any_count = [
            name for name, unit in self.units.items() if not unit.count and name != "vocab"
        ]
        names = ["vocab"] if placement.style.axis == "vocab" else exact or any_count
        stated = [name for name in names if name in placement.units] or names
        return stated[0] if len(stated) == 1 else "units"

    def local_spans(self, unit: str, rank: Rank) -> tuple[Span, ...]:
        """The units of a kind that a rank holds. Raises LayoutError if the unit has no count."""
        counted = self.units[unit]
        if counted.count is None:
            raise LayoutError(f"unit {unit!r} has no count in the config")
        block = self.count_block(unit, counted.count)
        section = Section(counted.count, 1, 1, counted.shared_by, block=block)
        return rank_spans([section], rank.tp_rank, rank.mesh.tp_size)

    def count_local_units(self, unit: str, rank: Rank) -> int:
        """How many units of a kind a rank holds, copies counted. Raises LayoutError."""
        return num_indices(self.local_spans(unit, rank))
