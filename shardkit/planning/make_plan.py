"""Makes a plan: places every tensor by the one rule that names it."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
)
from shardkit.planning.layout_plan import Plan
from shardkit.planning.loading import decide_loading, is_stated
from shardkit.planning.mesh import Mesh
from shardkit.planning.placement import Placement
from shardkit.planning.quantized import find_blocks, place_parts
from shardkit.planning.unknown_tensors import describe_unknown_tensor
from shardkit.recipe import Recipe, Rule, compose_recipe, resolve_counts, resolve_units
from shardkit.recipe.formats import Grouping, QuantizedWeight, group_checkpoint, list_weights
from shardkit.tensor import TensorSpec


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
    recipe, whole = compose_recipe(recipe, config), tuple(specs)
    grouping = group_checkpoint(whole, config)
    weights = list_weights(whole, grouping)
    prefix = find_wrapper_prefix([spec.name for spec in whole])
    names = [spec.name.removeprefix(prefix) for spec in weights]
    experts = find_experts(names, recipe) if expert_parallel else {}
    placements, units = _place_weights(weights, grouping, recipe, config, prefix, experts)
    check_any_expert(placements, recipe, expert_parallel)
    shapes = {name: spec.shape for name, spec in zip(names, weights, strict=True)}
    loaded = decide_loading(config, shapes)
    unloaded = loaded.unloaded.union(filter(recipe.find_prediction_module, names))
    placements = list(_mark_unloaded(placements, names, unloaded))
    plan = Plan(
        Mesh(tp_size, tp_size if expert_parallel else 1),
        tuple(place_parts(whole, placements, grouping)),
        units,
        list_other_attributes(recipe) if expert_parallel else recipe.module_attributes,
        recipe.forward_arguments,
        "" if is_stated(loaded.model_class, config) else loaded.model_class,
        prefix,
        grouping,
    )
    plan.check()
    return plan


def _mark_unloaded(
    placements: Iterable[Placement], names: Iterable[str], unloaded: Collection[str]
) -> Iterator[Placement]:
    """The placements, those of these names marked as not the model's."""
    for placement, name in zip(placements, names, strict=True):
        yield replace(placement, in_model=False) if name in unloaded else placement


def _place_weights(
    weights: Sequence[TensorSpec],
    grouping: Grouping,
    recipe: Recipe,
    config: Mapping[str, Any],
    prefix: str,
    experts: Experts,
) -> tuple[list[Placement], Mapping[str, Unit]]:
    """Every weight's placement, and the units, with as many together as blocks need.

    Weights of one name but for its numbers, and one shape, are alike.
    """
    units, counts = resolve_units(recipe, config), resolve_counts(recipe, config)
    keys = [(recipe.generalize(spec.name), spec.shape) for spec in weights]
    firsts: dict[object, TensorSpec] = {}
    for key, spec in zip(keys, weights, strict=True):
        firsts.setdefault(key, spec)

    def place_firsts(units: Mapping[str, Unit]) -> dict[object, Placement]:
        places = {k: place_tensor(s, recipe, units, counts, prefix) for k, s in firsts.items()}
        return {
            key: place_expert(placement, experts[name])
            if (name := placement.spec.name.removeprefix(prefix)) in experts
            else placement
            for key, placement in places.items()
        }

    try:
        alike = place_firsts(units)
    except RecipeError:
        if fault := describe_unknown_tensor([spec.name for spec in weights], recipe, prefix):
            raise RecipeError(fault) from None
        raise
    if grouping.weights:
        units = _keep_blocks_whole(alike.values(), grouping, recipe, units, prefix)
        alike = place_firsts(units)
    placements = [
        Placement(
            *(spec, first.style, first.dim, first.sections),
            units=first.units,
            expert=experts.get(spec.name.removeprefix(prefix)) if experts else None,
        )
        for spec, first in zip(weights, map(alike.__getitem__, keys), strict=True)
    ]
    return placements, units


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
    by_name = {weight.name: weight for weight in grouping.weights.values()}
    quantized: list[tuple[QuantizedWeight, Placement, Rule]] = []
    for placement in placements:
        name = placement.spec.name
        if (weight := by_name.get(name)) is None:
            continue
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
        return Placement(spec, rule.style)
    try:
        sections = resolve_sections(rule.terms, spec.shape[axis], units, counts)
    except RecipeError as error:
        raise RecipeError(f"{spec.name}: {error}") from None
    names = tuple(dict.fromkeys(term.unit for term in rule.terms if term.unit))
    return Placement(spec, rule.style, dim, sections, units=names)
