"""Where the stored tensors of a quantized weight lie, which follows from where the weight lies.

A weight is placed as it would be in 16 bits; each tensor that stores it is divided along the axes
that it shares with it, at the same places. The units that are distributed are made of whole blocks,
so that no block is of two ranks, if there are as many of these as ranks; otherwise each rank stores
the whole of every block that it has a part of, and computes its part.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from shardkit.dtypes import DTYPES
from shardkit.errors import LayoutError
from shardkit.layout import Section, Unit
from shardkit.layout.style import REPLICATE
from shardkit.planning.placement import Layout, Placement
from shardkit.planning.placement_table import PlacementGroup, PlacementTable
from shardkit.recipe import Recipe, Rule
from shardkit.recipe.formats import (
    AlikeWeights,
    Grouping,
    QuantizedWeight,
    StoredPart,
    find_plain_dtype,
)
from shardkit.tensor import TensorSpec


def count_indices_per_cut(weight: QuantizedWeight, axis: str) -> int:
    """How many of the weight's indices along an axis must stay together, for all that stores it."""
    numbers = [
        _count_per_index(weight, tensor, part, each.axis)
        for tensor, part in weight.parts
        for each in tensor.axes
        if each.axis == axis
    ]
    return math.lcm(*(number for number in numbers if number))


def find_axis(weight: QuantizedWeight, dim: int | None) -> str:
    """Which of a weight's axes a dimension is; empty for none, or one before `out` and `in`."""
    at = -3 if dim is None else dim - len(weight.shape)
    return weight.axes[at] if at >= -2 else ""


def find_blocks(
    weights: Iterable[tuple[QuantizedWeight, Placement, Rule]],
    recipe: Recipe,
    units: Mapping[str, Unit],
) -> dict[str, Unit]:
    """The units, with how many of each stay together so that every block is whole.

    Args:
        weights: Every quantized weight, where it lies if blocks may be cut, and its rule.
        recipe: Which units share which.
        units: The units by name.
    """
    own = ((name, unit) for name, unit in units.items() if not unit.shared_by)
    blocks = {(name, count): size for name, unit in own for count, size in unit.blocks.items()}
    for weight, placement, rule in weights:
        if not (axis := find_axis(weight, placement.dim)):
            continue
        indices = count_indices_per_cut(weight, axis)
        names = [term.unit for term in rule.terms]
        for name, section in zip(names, placement.sections, strict=True):
            if name is None or section.group_tail:
                continue
            count = indices // math.gcd(section.size, indices)
            key, sharers = (name, section.units), 1
            if section.shared_by:
                key, sharers = (recipe.units[name].shared_by, section.shared_by), section.group_size
            blocks[key] = math.lcm(blocks.get(key, 1), count * sharers if count > 1 else 1)
    return {name: _add_blocks(name, unit, recipe, blocks) for name, unit in units.items()}


def _add_blocks(
    name: str, unit: Unit, recipe: Recipe, blocks: Mapping[tuple[str, int], int]
) -> Unit:
    """A unit with its blocks; one that is shared follows those that share it."""
    rule = recipe.units.get(name)
    if unit.shared_by and rule is not None and unit.count:
        block = blocks.get((rule.shared_by, unit.shared_by), 1)
        return replace(unit, blocks={unit.count: block} if block > 1 else {})
    own = {count: block for (of, count), block in blocks.items() if of == name and block > 1}
    return replace(unit, blocks=own)


def place_parts(
    names: Sequence[str], groups: Iterable[PlacementGroup], grouping: Grouping
) -> PlacementTable:
    """Where every stored tensor lies, by where the weights lie.

    Args:
        names: The stored tensors, in order.
        groups: The weights, a quantized one as it would be in 16 bits.
        grouping: Which tensors store them.

    Raises:
        LayoutError: If blocks would be cut.
    """
    if not grouping.alike:
        return PlacementTable(names, groups)
    stored = [PlacementGroup(each, Layout(REPLICATE)) for each in grouping.constants]
    quantized = {name for each in grouping.alike for name in each.names}
    layouts: dict[str, Layout] = {}
    for group in groups:
        if group.tensors.names[0] in quantized:
            layouts |= dict.fromkeys(group.tensors.names, group.layout)
        else:
            stored.append(group)
    for each in grouping.alike:
        for weights in each.split_by(each.names, layouts.__getitem__):
            stored += _place_alike(weights, layouts[weights.names[0]])
    return PlacementTable(names, stored)


def _place_alike(weights: AlikeWeights, layout: Layout) -> Iterator[PlacementGroup]:
    """Where what is stored of some weights of one layout lies."""
    first = weights.first
    placement = Placement(first.make_spec(first.codes.dtype), layout)
    for part, (tensor, spec) in zip(weights.parts, first.parts, strict=True):
        yield PlacementGroup(part, place_part(first, tensor, spec, placement).layout)


def place_part(
    weight: QuantizedWeight, tensor: StoredPart, part: TensorSpec, placement: Placement
) -> Placement:
    """Where one of the tensors that store a weight lies. Raises LayoutError if blocks are cut."""
    axis = find_axis(weight, placement.dim)
    own = _move(placement, part, None, ())
    if placement.dim is None:
        return _keep_gathered(own, placement) if tensor is weight.scheme.format.codes else own
    whole = Placement(part, Layout(REPLICATE, in_model=placement.in_model))
    if len(part.shape) < len(tensor.axes) or math.prod(part.shape) == 1:
        return whole
    if not axis:
        is_stacked = len(part.shape) == len(weight.shape) - 2 + len(tensor.axes)
        return replace(own, layout=placement.layout) if is_stacked else whole
    lead = len(part.shape) - len(tensor.axes)
    at = next((i for i, each in enumerate(tensor.axes) if each.axis == axis), None)
    per = None if at is None else _count_per_index(weight, tensor, part, axis)
    if at is None or per is None:
        return whole
    layout = _move(placement, part, lead + at, placement.sections).layout
    block = count_indices_per_cut(weight, axis)
    return Placement(part, replace(layout, index_size=per, block_size=block))


def _move(
    placement: Placement, spec: TensorSpec, dim: int | None, sections: tuple[Section, ...]
) -> Placement:
    """The placement of another tensor of the same weight, along a dimension of its own."""
    return Placement(spec, replace(placement.layout, dim=dim, sections=sections))


def _keep_gathered(codes: Placement, placement: Placement) -> Placement:
    """The codes of a weight that is not divided, with what its gathered inputs hold, if they are.

    Raises LayoutError if the codes are packed, and so do not show how wide the input is.
    """
    width = sum(map(len, placement.sections))
    if placement.sections and codes.spec.shape[-1:] != (width,):
        raise LayoutError(
            f"{codes.spec.name}: runs on inputs gathered from all ranks, and is packed;"
            " split the 16-bit weights"
        )
    return _move(codes, codes.spec, None, placement.sections)


def _count_per_index(
    weight: QuantizedWeight, tensor: StoredPart, part: TensorSpec, axis: str
) -> int | None:
    """How many of the weight's indices one stored index along an axis stands for; None for all.

    If each input names its group, groups follow no order, and a rank needs all of them.
    """
    each = next(each for each in tensor.axes if each.axis == axis)
    per = weight.scheme.count_per_index(tensor, each, part.dtype)
    is_grouped = any(t is weight.scheme.format.group_index for t, _ in weight.parts)
    is_codes = tensor is weight.scheme.format.codes
    if axis == "in" and is_grouped and per != 1 and not is_codes:
        return None
    return None if math.prod(part.shape) == 1 else per


def view_weights(placements: PlacementTable, grouping: Grouping) -> PlacementTable:
    """The placements with each quantized weight as one, as it would be in 16 bits."""
    dtype = find_plain_dtype(placements.list_tensors(), grouping)
    views: list[PlacementGroup] = []
    for group in placements.groups:
        if (plain := grouping.leave_plain(group.tensors)) is not None:
            views.append(PlacementGroup(plain, group.layout))
    layouts = {
        name: group.layout
        for group in placements.groups
        if not DTYPES[group.tensors.dtype].is_compute
        for name in group.tensors.names
    }
    for each in grouping.alike:
        for weights in each.split_by(each.codes.names, layouts.__getitem__):
            view = _view_weight(weights.first, layouts[weights.codes.names[0]])
            views.append(PlacementGroup(weights.make_alike(dtype), view))
    return PlacementTable([name for view in views for name in view.tensors.names], views)


def check_parts(placements: PlacementTable, grouping: Grouping) -> None:
    """Raise LayoutError unless what stores each quantized weight lies where its codes say."""
    layouts = {name: group.layout for group in placements.groups for name in group.tensors.names}
    for each in grouping.alike:
        for weights in each.split_by(each.codes.names, layouts.__getitem__):
            first = weights.first
            view = _view_weight(first, layouts[first.codes.name])
            for part in _place_alike(weights, view):
                for name in part.tensors.names:
                    if layouts[name] != part.layout:
                        raise LayoutError(f"{name}: is not placed as {first.codes.name} is")


def _view_weight(weight: QuantizedWeight, codes: Layout) -> Layout:
    """The layout of a weight in 16 bits, by that of its codes."""
    tensor, part = weight.parts[0]
    lead = len(weight.shape) - 2
    if codes.dim is None or codes.dim < lead:
        return codes
    axis = tensor.axes[codes.dim - lead]
    if not axis.axis:
        raise LayoutError(f"{part.name}: dimension {codes.dim} is inside of a block")
    dim = lead + weight.axes.index(axis.axis)
    return replace(codes, dim=dim, index_size=1, block_size=1)
