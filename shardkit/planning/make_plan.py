"""Makes a plan: places every tensor by the one rule that names it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardkit.checkpoint import find_wrapper_prefix
from shardkit.errors import RecipeError
from shardkit.layout import Unit, resolve_sections
from shardkit.planning.experts import (
    Experts,
    check_any_expert,
    find_experts,
    list_other_attributes,
    place_expert,
    split_by_expert,
)
from shardkit.planning.layout_plan import Plan
from shardkit.planning.loading import decide_loading, is_stated
from shardkit.planning.mesh import Mesh
from shardkit.planning.placement import Layout, Placement
from shardkit.planning.placement_table import PlacementGroup
from shardkit.planning.quantized import find_blocks, place_parts
from shardkit.planning.unknown_tensors import describe_unknown_tensor
from shardkit.recipe import Recipe, Rule, compose_recipe, resolve_counts, resolve_units
from shardkit.recipe.formats import Grouping, QuantizedWeight, group_checkpoint, list_weights
from shardkit.tensor import TensorSpec, TensorTable


def make_plan(
    specs: Iterable[TensorSpec],
    recipe: Recipe,
    config: Mapping[str, Any],
    tp_size: int,
    expert_parallel: bool = False,
) -> Plan:
    """Place every tensor by the one rule that names it.

    Args:
        specs: Every tensor, in the order in which the source's files hold them.
        recipe: The rules.
        config: The source's config.json.
        tp_size: The number of ranks.
        expert_parallel: Whether each rank has whole experts, instead of a part of every one.

    Raises:
        RecipeError: For a tensor that no rule names, or two rules name.
        LayoutError: For a `tp_size` that cannot work, or if there are no experts to distribute.
        CheckpointError: If the checkpoint lacks a head that the class in its config needs.
    """
    recipe, whole = compose_recipe(recipe, config), TensorTable.of(specs)
    grouping = group_checkpoint(whole, config)
    weights = list_weights(whole, grouping)
    prefix = find_wrapper_prefix(whole.names)
    experts = find_experts(weights.alike, recipe) if expert_parallel else {}
    groups, units = _place_weights(weights, grouping, recipe, config, prefix, experts)
    check_any_expert(groups, recipe, expert_parallel)
    plain = weights.without_prefix(prefix)
    loaded = decide_loading(config, plain)
    unloaded = loaded.unloaded.union(filter(recipe.find_prediction_module, plain.names))
    groups = _mark_unloaded(groups, frozenset(prefix + name for name in unloaded))
    plan = Plan(
        Mesh(tp_size, tp_size if expert_parallel else 1),
        place_parts(whole.names, groups, grouping),
        units,
        list_other_attributes(recipe) if expert_parallel else recipe.module_attributes,
        recipe.forward_arguments,
        "" if is_stated(loaded.model_class, config) else loaded.model_class,
        prefix,
        grouping,
        recipe.joint_sums,
    )
    plan.check()
    return plan


def _mark_unloaded(
    groups: Sequence[PlacementGroup], unloaded: frozenset[str]
) -> Sequence[PlacementGroup]:
    """The placements, those of what the model does not load as such."""
    if not unloaded:
        return groups
    return [
        PlacementGroup(part, replace(group.layout, in_model=part.names[0] not in unloaded))
        for group in groups
        for part in group.tensors.split_by(unloaded.__contains__)
    ]


def _place_weights(
    weights: TensorTable,
    grouping: Grouping,
    recipe: Recipe,
    config: Mapping[str, Any],
    prefix: str,
    experts: Experts,
) -> tuple[Sequence[PlacementGroup], Mapping[str, Unit]]:
    """Every weight's placement, and the units, with as many together as blocks need.

    Weights of one name but for numbers that no rule states, and one shape, are alike.
    """
    units, counts = resolve_units(recipe, config), resolve_counts(recipe, config)
    alike = [part for each in weights.alike for part in recipe.split_by_rule(each)]

    def place_firsts(units: Mapping[str, Unit]) -> list[Placement]:
        placed = (place_tensor(each.first, recipe, units, counts, prefix) for each in alike)
        return [place_expert(placement, experts) for placement in placed]

    try:
        firsts = place_firsts(units)
    except RecipeError:
        if fault := describe_unknown_tensor(weights.names, recipe, prefix):
            raise RecipeError(fault) from None
        raise
    if grouping.alike:
        units = _keep_blocks_whole(firsts, grouping, recipe, units, prefix)
        firsts = place_firsts(units)
    pairs = zip(alike, firsts, strict=True)
    return [g for each, p in pairs for g in split_by_expert(each, p.layout, experts)], units


def _keep_blocks_whole(
    placements: Iterable[Placement],
    grouping: Grouping,
    recipe: Recipe,
    units: Mapping[str, Unit],
    prefix: str,
) -> dict[str, Unit]:
    """The units with as many of each together as quantized weights have in a block.

    Raises RecipeError for a weight whose format stores it the other way round than its rule says.
    """
    by_name = {name: each for each in grouping.alike for name in each.names}
    quantized: list[tuple[QuantizedWeight, Placement, Rule]] = []
    for placement in placements:
        name = placement.spec.name
        if name not in by_name:
            continue
        weight = by_name[name].first  # which is alike
        rule = recipe.rule_for(name.removeprefix(prefix))
        if placement.dim is not None and rule.fan_in_fan_out != weight.scheme.format.transposed:
            raise RecipeError(
                f"{name}: recipe {recipe.name!r} has it stored"
                f" {'[in, out]' if rule.fan_in_fan_out else '[out, in]'}, which"
                f" {weight.scheme.format.title} does not; split the 16-bit weights"
            )
        quantized.append((weight, placement, rule))
    return find_blocks(quantized, recipe, units)


def place_tensor(
    spec: TensorSpec,
    recipe: Recipe,
    units: Mapping[str, Unit],
    counts: Mapping[str, int] | None = None,
    wrapper_prefix: str = "",
) -> Placement:
    """One tensor's placement, by the rule for its name without a prefix. Raises RecipeError."""
    rule = recipe.rule_for(spec.name.removeprefix(wrapper_prefix))
    ndim = len(spec.shape)
    dim = rule.dim(spec.shape, counts or {})
    axis = dim
    if rule.terms and rule.style.divides == "nothing" and ndim:
        axis = ndim - 1  # what is gathered is the input, which is as wide as the tensor
    if axis is None:
        return Placement(spec, Layout(rule.style))
    try:
        sections = resolve_sections(rule.terms, spec.shape[axis], units, counts)
    except RecipeError as error:
        raise RecipeError(f"{spec.name}: {error}") from None
    names = tuple(dict.fromkeys(term.unit for term in rule.terms if term.unit))
    return Placement(spec, Layout(rule.style, dim, sections, units=names))
