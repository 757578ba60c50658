"""Expert parallelism: which tensors are a mixture's experts, and where whole ones lie.

The experts of a stack are stored one by one, `experts.3.up_proj.weight`, or as one tensor with a
dimension of experts before the others.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from shardkit.errors import CheckpointError, LayoutError
from shardkit.layout import Section
from shardkit.layout.style import ADD_ONCE, EXPERT
from shardkit.planning.placement import Expert, Layout, Placement
from shardkit.planning.placement_table import PlacementGroup
from shardkit.recipe import ModuleAttribute, Recipe
from shardkit.tensor import AlikeTensors

IN_STACK = None  # what stands for the expert if a tensor has all of a stack

Experts = Mapping[str, Expert | None]


def find_experts(tensors: Iterable[AlikeTensors], recipe: Recipe) -> dict[str, Expert | None]:
    """The tensors that lie in a recipe's experts, and the expert that each is of.

    Args:
        tensors: Every tensor.
        recipe: What says which modules are experts.

    Raises:
        CheckpointError: If a stack lacks one of its experts.
    """
    inside = [name for each in tensors if recipe.match_experts(each.pattern) for name in each.names]
    matches = {name: match for name in inside if (match := recipe.match_experts(name))}
    numbers: dict[str, set[int]] = {}
    for match in matches.values():
        if match["number"] is not None:
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    for stack, present in numbers.items():
        missing = next((n for n in range(max(present)) if n not in present), None)
        if missing is not None:
            raise CheckpointError(f"{stack}: has expert {max(present)}, but no expert {missing}")
    return {
        name: IN_STACK
        if match["number"] is None
        else Expert(int(match["number"]), len(numbers[match["stack"]]))
        for name, match in matches.items()
    }


def place_expert(placement: Placement, experts: Experts) -> Placement:
    """Where a tensor lies if each rank has whole experts.

    Of a tensor that has all of a stack, what no rule divides is the router's, and stays as it is.

    Args:
        placement: Where the tensor lies if ranks share every expert.
        experts: What each tensor of experts is of.
    """
    name, layout = placement.spec.name, placement.layout
    if name not in experts:
        return placement
    if (expert := experts[name]) is not None:
        return replace(
            placement, layout=replace(layout, style=EXPERT, dim=None, sections=(), expert=expert)
        )
    if placement.dim is None and placement.style is not ADD_ONCE:
        return placement
    length = placement.spec.shape[0]
    # Experts may be stacked in one axis, `[experts * out, in]`: the blocks of what is divided.
    count = placement.sections[0].repeat if placement.dim == 0 else length
    sections = (Section(count, length // count),)
    return replace(placement, layout=replace(layout, style=EXPERT, dim=0, sections=sections))


def split_by_expert(
    tensors: AlikeTensors, layout: Layout, experts: Experts
) -> Iterator[PlacementGroup]:
    """Tensors that are alike, by the layout of the first: those of one expert in one group."""
    if layout.expert is None:
        yield PlacementGroup(tensors, layout)
        return
    for part in tensors.split_by(experts.__getitem__):
        yield PlacementGroup(part, replace(layout, expert=experts[part.names[0]]))


def check_any_expert(
    groups: Iterable[PlacementGroup], recipe: Recipe, expert_parallel: bool
) -> None:
    """Raise LayoutError if experts are to be distributed and none is among the tensors."""
    if expert_parallel and not any(group.layout.style is EXPERT for group in groups):
        raise LayoutError(
            f"no tensor is of an expert that recipe {recipe.name!r} can place whole on a rank;"
            " split without --expert-parallel"
        )


def list_other_attributes(recipe: Recipe) -> tuple[ModuleAttribute, ...]:
    """The module attributes that count something on a rank that has whole experts."""
    return tuple(
        rule for rule in recipe.module_attributes if recipe.match_experts(rule.module) is None
    )
