"""Where the stored tensors of a quantized weight lie, which follows from where the weight lies.

A weight is placed as it would be in 16 bits; each tensor that stores it is divided along the axes
that it shares with it, at the same places. No block is ever shared by two ranks, so the units that
are distributed are made of whole blocks.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from shardkit.errors import LayoutError
from shardkit.layout import Section, Unit
from shardkit.layout.style import REPLICATE
from shardkit.planning.placement import Placement
from shardkit.recipe import Recipe, Rule
from shardkit.recipe.formats import Grouping, QuantizedWeight, StoredPart, find_plain_dtype
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
    blocks: dict[tuple[str, int], int] = {}
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
    specs: Iterable[TensorSpec], placements: Iterable[Placement], grouping: Grouping
) -> Iterator[Placement]:
    """Where every stored tensor lies, in the order of the specs, by where the weights lie.

    Raises LayoutError if blocks would be cut.
    """
    by_name = {placement.spec.name: placement for placement in placements}
    alike: dict[object, Placement] = {}
    for spec in specs:
        if (owner := grouping.codes_by_part.get(spec.name)) is not None:
            weight = grouping.weights[owner]
            placement = by_name[weight.name]
            tensor = next(tensor for tensor, part in weight.parts if part is spec)
            key = (
                id(tensor), spec.shape, spec.dtype, weight.shape, placement.style.name,
                placement.dim, placement.sections, placement.in_model,
            )  # fmt: skip
            if (first := alike.get(key)) is None:
                first = alike[key] = place_part(weight, tensor, spec, placement)
            yield Placement(
                *(spec, first.style, first.dim, first.sections, first.in_model, first.units),
                expert=placement.expert,
            )
        elif spec.name in grouping.constants:
            yield Placement(spec, REPLICATE)
        else:
            yield by_name[spec.name]


def place_part(
    weight: QuantizedWeight, tensor: StoredPart, part: TensorSpec, placement: Placement
) -> Placement:
    """Where one of the tensors that store a weight lies. Raises LayoutError if blocks are cut."""
    axis = find_axis(weight, placement.dim)
    own = replace(placement, spec=part, dim=None, sections=())
    if placement.dim is None:
        return _keep_gathered(own, placement) if tensor is weight.scheme.format.codes else own
    whole = Placement(part, REPLICATE, in_model=placement.in_model)
    if len(part.shape) < len(tensor.axes) or math.prod(part.shape) == 1:
        return whole
    if not axis:
        is_stacked = len(part.shape) == len(weight.shape) - 2 + len(tensor.axes)
        return replace(own, dim=placement.dim, sections=placement.sections) if is_stacked else whole
    lead = len(part.shape) - len(tensor.axes)
    at = next((i for i, each in enumerate(tensor.axes) if each.axis == axis), None)
    per = None if at is None else _count_per_index(weight, tensor, part, axis)
    if at is None or per is None:
        return whole
    sections = tuple(
        scale_section(section, per, part.name, is_last=number == len(placement.sections) - 1)
        for number, section in enumerate(placement.sections)
    )
    return replace(own, dim=lead + at, sections=sections)


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
    return replace(codes, sections=placement.sections)


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


def scale_section(section: Section, per: int, name: str, is_last: bool) -> Section:
    """A weight's section in a tensor of which each index stands for `per` of the weight's.

    Raises LayoutError if an index would be of two ranks.
    """
    if section.size % per == 0:
        return replace(section, size=section.size // per)
    length, whole = len(section), section.units * section.size
    if (length % per and not is_last) or (section.repeat > 1 and whole % per):
        raise LayoutError(
            f"{name}: a section of {whole if section.repeat > 1 else length} is not a multiple of"
            f" the {per} that are quantized together, so a block would be of two ranks;"
            " split the 16-bit weights"
        )
    if section.replicated:
        return Section(1, -(-length // per), replicated=True)
    merged = per // math.gcd(section.size, per)
    if section.shared_by:
        if (
            section.group_tail
            or section.units % merged
            or section.block % (merged * section.group_size)
        ):
            raise LayoutError(
                f"{name}: {section.units} units of {section.size} cannot be divided between blocks"
                f" of {per}; split the 16-bit weights"
            )
        size = section.size * merged // per
        return replace(section, units=section.units // merged, size=size)
    if section.block * section.size % per:
        raise LayoutError(
            f"{name}: blocks of {per} are cut between units; split the 16-bit weights"
        )
    return Section(-(-whole // per), 1, section.repeat, block=section.block * section.size // per)


def widen_section(section: Section, per: int) -> Section:
    """The weight's section whose codes are packed, `per` to an index: the converse of scaling."""
    return replace(section, size=section.size * per)


def view_weights(placements: Sequence[Placement], grouping: Grouping) -> list[Placement]:
    """The placements with each quantized weight as one, as it would be in 16 bits."""
    dtype = find_plain_dtype((p.spec for p in placements), grouping)
    views: list[Placement] = []
    for placement in placements:
        name = placement.spec.name
        if name in grouping.weights:
            views.append(_view_weight(grouping.weights[name], placement, dtype))
        elif name not in grouping.codes_by_part and name not in grouping.constants:
            views.append(placement)
    return views


def _view_weight(weight: QuantizedWeight, codes: Placement, dtype: str) -> Placement:
    spec = weight.make_spec(dtype)
    if codes.dim is None:
        return replace(codes, spec=spec)
    tensor, part = weight.parts[0]
    lead = len(weight.shape) - 2
    if codes.dim < lead:
        return replace(codes, spec=spec)
    axis = tensor.axes[codes.dim - lead]
    if not axis.axis:
        raise LayoutError(f"{part.name}: dimension {codes.dim} is inside of a block")
    per = weight.scheme.count_per_index(tensor, axis, part.dtype) or 1
    sections = tuple(widen_section(section, per) for section in codes.sections)
    dim = lead + weight.axes.index(axis.axis)
    return replace(codes, spec=spec, dim=dim, sections=sections)
