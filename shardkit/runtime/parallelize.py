"""Makes a model built whole on the meta device into one rank's part of it."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shardkit.errors import LayoutError, ManifestError
from shardkit.layout.spans import Section, Span, partition, rank_spans
from shardkit.planning.plan import Placement, Plan
from shardkit.recipe.recipe import ForwardArgument, ModuleAttribute, compile_module_pattern
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers import linear as layers
from shardkit.runtime.layers import norm as norms
from shardkit.runtime.layers.lstm import make_parallel_lstm
from shardkit.shards.manifest import Manifest

LISTS = (nn.ModuleList, torch.Tensor)  # of which a rank keeps its own, once they are filled


def parallelize_model(
    model: nn.Module,
    manifest: Manifest,
    placed: Mapping[str, Placement],
    group: TensorParallelGroup,
) -> None:
    """Swap modules, shrink attributes and slice arguments for one rank.

    `placed` gives the placement on disk that each of the model's own tensors is made of.
    Raises ManifestError where the model is not the one the manifest describes.
    """
    owned: dict[str, dict[str, Placement]] = {}
    for name, placement in placed.items():
        module, _, leaf = name.rpartition(".")
        owned.setdefault(module, {})[leaf] = placement
    for path, placements in owned.items():
        _swap_module(model.get_submodule(path), path, placements, group)
    for attribute in manifest.plan.module_attributes:
        _set_attribute(model, attribute, manifest.plan, placed, group.tp_rank)
    for argument in manifest.plan.forward_arguments:
        _slice_argument(model, argument, manifest.plan, group.tp_rank)


def _swap_module(
    module: nn.Module, path: str, placements: Mapping[str, Placement], group: TensorParallelGroup
) -> None:
    """Give a module its parallel form, which follows from its weights' placements together."""
    by_style = {p.style: p for leaf, p in placements.items() if leaf != "bias" or p.dim is not None}
    if any(p.style == "row" and p.dim is not None for p in placements.values()):
        layers.make_row_parallel(module, group)
    elif found := by_style.get("vocab"):
        held = [_placement_indices(found, rank, group) for rank in range(group.tp_size)]
        sizes = [len(indices) for indices in held]
        layers.make_vocab_parallel(module, group, int(held[group.tp_rank][0]), sizes)
    elif found := by_style.get("norm"):
        parts = [_placement_indices(found, rank, group) for rank in range(group.tp_size)]
        norms.make_sharded_norm(module, path, group, parts)
    elif found := by_style.get("gather"):
        parts = [
            _span_indices(rank_spans(found.sections, rank, group.tp_size))
            for rank in range(group.tp_size)
        ]
        norms.make_gathered(module, group, parts)
    elif isinstance(module, nn.LSTM) and "column" in by_style:
        make_parallel_lstm(module, path, placements, group)
    elif "column" in by_style:
        layers.make_column_parallel(module)


def _placement_indices(
    placement: Placement, tp_rank: int, group: TensorParallelGroup
) -> torch.Tensor:
    return _span_indices(placement.spans(tp_rank, group.tp_size))


def _span_indices(parts: Iterable[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in parts])


def find_modules(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules a pattern names.  Raises ManifestError where it names none, unless by `?`."""
    compiled, found = compile_module_pattern(pattern), False
    for name, module in model.named_modules():
        if compiled.fullmatch(name):
            found = True
            yield name, module
    if not found and not pattern.endswith("?"):
        raise ManifestError(f"{type(model).__name__} has no module {pattern!r}")


def scale_count(full: int, times: tuple[int, int], per: tuple[int, int]) -> int:
    """`full`, scaled as its units are: by local over all of `times`, and all over local of `per`.

    Raises LayoutError where that is no whole number.
    """
    value, rest = divmod(full * times[0] * per[1], times[1] * per[0])
    if rest:
        raise LayoutError(f"{full} is no multiple of {times[1]} units")
    return value


def _set_attribute(
    model: nn.Module,
    rule: ModuleAttribute,
    plan: Plan,
    placed: Mapping[str, Placement],
    tp_rank: int,
) -> None:
    for path, module in find_modules(model, rule.module):
        owner, name = _find_owner(module, rule.attribute.removesuffix("?"))
        full = getattr(owner, name, None)
        lacking = full is None or (rule.by_tensor and f"{path}.{rule.unit}" not in placed)
        if isinstance(full, LISTS) or (lacking and rule.attribute.endswith("?")):
            continue
        if type(full) is not int:
            raise ManifestError(f"{rule.module}: no integer attribute {name!r}")
        if rule.by_tensor:
            setattr(owner, name, len(_tensor_indices(full, rule, path, placed, plan, tp_rank)))
        else:
            setattr(owner, name, shrink_attribute(full, rule, plan, tp_rank))


def shrink_attribute(full: int, rule: ModuleAttribute, plan: Plan, tp_rank: int) -> int:
    """An attribute's local value: scaled as its units are, or dealt out where they have no count.

    Raises LayoutError where that is no whole number.
    """
    count = plan.units[rule.unit].count
    if count is None:
        return len(partition(full, tp_rank, plan.tp_size))
    per = (1, 1)
    if rule.per_unit:
        per = plan.count_local_units(rule.per_unit, tp_rank), plan.units[rule.per_unit].count or 0
    return scale_count(full, (plan.count_local_units(rule.unit, tp_rank), count), per)


def keep_local_units(
    model: nn.Module, plan: Plan, placed: Mapping[str, Placement], tp_rank: int
) -> None:
    """Of lists of modules and of buffers that are divided, keep the rank's own, once filled.

    Raises ManifestError for one of another length.
    """
    for rule in plan.module_attributes:
        name = rule.attribute.removesuffix("?")
        for path, module in find_modules(model, rule.module):
            full = getattr(module, name, None)
            if isinstance(full, torch.Tensor):
                own = _tensor_indices(full.shape[-1], rule, path, placed, plan, tp_rank)
                setattr(module, name, full.index_select(-1, own.to(full.device)))
            elif isinstance(full, nn.ModuleList):
                setattr(module, name, _select_modules(full, rule, plan, tp_rank))


def _select_modules(
    full: nn.ModuleList, rule: ModuleAttribute, plan: Plan, tp_rank: int
) -> nn.ModuleList:
    unit = plan.units.get(rule.unit)
    if unit is None or len(full) != unit.count:
        raise ManifestError(f"{rule.module}.{rule.attribute}: {len(full)} modules")
    held = rank_spans([Section(unit.count, 1, 1, unit.shared_by)], tp_rank, plan.tp_size)
    return nn.ModuleList(full[i] for i in _span_indices(held).tolist())


def _tensor_indices(
    full: int,
    rule: ModuleAttribute,
    path: str,
    placed: Mapping[str, Placement],
    plan: Plan,
    tp_rank: int,
) -> torch.Tensor:
    """The indices that a rank holds of the tensor along which an attribute is counted."""
    found = placed.get(f"{path}.{rule.unit}")
    if found is None or found.dim is None or found.spec.shape[found.dim] != full:
        raise ManifestError(f"{path}.{rule.attribute}: {full} is no length of a {rule.unit}")
    return _span_indices(found.spans(tp_rank, plan.tp_size))


def _find_owner(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """Who holds an attribute: the module, or a config of its own, since modules share theirs."""
    *path, name = attribute.split(".")
    owner: Any = module
    for part in path:
        own = copy.copy(getattr(owner, part))
        setattr(owner, part, own)
        owner = own
    return owner, name


def _slice_argument(model: nn.Module, rule: ForwardArgument, plan: Plan, tp_rank: int) -> None:
    unit = plan.units[rule.unit]
    count = unit.count or 0
    index = _span_indices(rank_spans([Section(count, 1, 1, unit.shared_by)], tp_rank, plan.tp_size))

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(rule.argument)
        if isinstance(value, torch.Tensor):
            kwargs = {**kwargs, rule.argument: select_rank_units(value, rule, count, index)}
        return args, kwargs

    for _, module in find_modules(model, rule.module):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def select_rank_units(
    value: torch.Tensor, rule: ForwardArgument, count: int, index: torch.Tensor
) -> torch.Tensor:
    """The units of `value` along the rule's dimension that a rank holds.

    A value that has one entry for all units (a mask that broadcasts) is left as it is.
    """
    index = index.to(value.device)
    if value.shape[rule.dim] == 1:
        return value
    if not rule.outer:
        return value.index_select(rule.dim, index)
    shape = value.shape
    apart = value.reshape(*shape[: rule.dim], -1, count, *shape[rule.dim + 1 :])
    own = apart.index_select(rule.dim + 1, index)
    return own.flatten(rule.dim, rule.dim + 1)
