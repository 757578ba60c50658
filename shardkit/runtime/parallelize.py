"""Makes a model built whole on the meta device into one rank's part of it."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shardkit.errors import LayoutError, ManifestError
from shardkit.layout.spans import Section, Span, deal, spans
from shardkit.planning.plan import Placement, Plan
from shardkit.recipe.recipe import LocalArgument, LocalAttribute, module_pattern
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers import linear as layers
from shardkit.runtime.layers import norm as norms
from shardkit.runtime.layers.lstm import make_parallel_lstm
from shardkit.shards.manifest import Manifest

LISTS = (nn.ModuleList, torch.Tensor)  # of which a rank keeps its own, once they are filled


def localize(
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
        _swap(model.get_submodule(path), path, placements, group)
    for attribute in manifest.plan.attributes:
        _shrink(model, attribute, manifest.plan, placed, group.tp_rank)
    for argument in manifest.plan.arguments:
        _slice(model, argument, manifest.plan, group.tp_rank)


def _swap(
    module: nn.Module, path: str, placements: Mapping[str, Placement], group: TensorParallelGroup
) -> None:
    """Give a module its parallel form, which follows from its weights' placements together."""
    by_style = {p.style: p for leaf, p in placements.items() if leaf != "bias" or p.dim is not None}
    if any(p.style == "row" and p.dim is not None for p in placements.values()):
        layers.make_row_parallel(module, group)
    elif found := by_style.get("vocab"):
        held = [_held(found, rank, group) for rank in range(group.tp_size)]
        sizes = [len(indices) for indices in held]
        layers.make_vocab_parallel(module, group, int(held[group.tp_rank][0]), sizes)
    elif found := by_style.get("norm"):
        parts = [_held(found, rank, group) for rank in range(group.tp_size)]
        norms.make_sharded_norm(module, path, group, parts)
    elif found := by_style.get("gather"):
        parts = [
            _indices(spans(found.sections, rank, group.tp_size)) for rank in range(group.tp_size)
        ]
        norms.make_gathered(module, group, parts)
    elif isinstance(module, nn.LSTM) and "column" in by_style:
        make_parallel_lstm(module, path, placements, group)
    elif "column" in by_style:
        layers.make_column_parallel(module)


def _held(placement: Placement, tp_rank: int, group: TensorParallelGroup) -> torch.Tensor:
    return _indices(placement.spans(tp_rank, group.tp_size))


def _indices(parts: Iterable[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in parts])


def matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules a pattern names.  Raises ManifestError where it names none, unless by `?`."""
    compiled, found = module_pattern(pattern), False
    for name, module in model.named_modules():
        if compiled.fullmatch(name):
            found = True
            yield name, module
    if not found and not pattern.endswith("?"):
        raise ManifestError(f"{type(model).__name__} has no module {pattern!r}")


def local_value(full: int, times: tuple[int, int], per: tuple[int, int]) -> int:
    """`full`, scaled as its units are: by local over all of `times`, and all over local of `per`.

    Raises LayoutError where that is no whole number.
    """
    value, rest = divmod(full * times[0] * per[1], times[1] * per[0])
    if rest:
        raise LayoutError(f"{full} is no multiple of {times[1]} units")
    return value


def _shrink(
    model: nn.Module,
    rule: LocalAttribute,
    plan: Plan,
    placed: Mapping[str, Placement],
    tp_rank: int,
) -> None:
    for path, module in matching(model, rule.module):
        owner, name = _owner(module, rule.attribute.removesuffix("?"))
        full = getattr(owner, name, None)
        lacking = full is None or (rule.by_tensor and f"{path}.{rule.times}" not in placed)
        if isinstance(full, LISTS) or (lacking and rule.attribute.endswith("?")):
            continue
        if type(full) is not int:
            raise ManifestError(f"{rule.module}: no integer attribute {name!r}")
        if rule.by_tensor:
            setattr(owner, name, len(_own(full, rule, path, placed, plan, tp_rank)))
        else:
            setattr(owner, name, shrunk(full, rule, plan, tp_rank))


def shrunk(full: int, rule: LocalAttribute, plan: Plan, tp_rank: int) -> int:
    """An attribute's local value: scaled as its units are, or dealt out where they have no count.

    Raises LayoutError where that is no whole number.
    """
    count = plan.units[rule.times].count
    if count is None:
        return len(deal(full, tp_rank, plan.tp_size))
    per = (1, 1)
    if rule.per:
        per = plan.local(rule.per, tp_rank), plan.units[rule.per].count or 0
    return local_value(full, (plan.local(rule.times, tp_rank), count), per)


def select(model: nn.Module, plan: Plan, placed: Mapping[str, Placement], tp_rank: int) -> None:
    """Of lists of modules and of buffers that are divided, keep the rank's own, once filled.

    Raises ManifestError for one of another length.
    """
    for rule in plan.attributes:
        name = rule.attribute.removesuffix("?")
        for path, module in matching(model, rule.module):
            full = getattr(module, name, None)
            if isinstance(full, torch.Tensor):
                own = _own(full.shape[-1], rule, path, placed, plan, tp_rank)
                setattr(module, name, full.index_select(-1, own.to(full.device)))
            elif isinstance(full, nn.ModuleList):
                setattr(module, name, _own_modules(full, rule, plan, tp_rank))


def _own_modules(
    full: nn.ModuleList, rule: LocalAttribute, plan: Plan, tp_rank: int
) -> nn.ModuleList:
    unit = plan.units.get(rule.times)
    if unit is None or len(full) != unit.count:
        raise ManifestError(f"{rule.module}.{rule.attribute}: {len(full)} modules")
    held = spans([Section(unit.count, 1, 1, unit.sharers)], tp_rank, plan.tp_size)
    return nn.ModuleList(full[i] for i in _indices(held).tolist())


def _own(
    full: int,
    rule: LocalAttribute,
    path: str,
    placed: Mapping[str, Placement],
    plan: Plan,
    tp_rank: int,
) -> torch.Tensor:
    """The indices that a rank holds of the tensor along which an attribute is counted."""
    found = placed.get(f"{path}.{rule.times}")
    if found is None or found.dim is None or found.spec.shape[found.dim] != full:
        raise ManifestError(f"{path}.{rule.attribute}: {full} is no length of a {rule.times}")
    return _indices(found.spans(tp_rank, plan.tp_size))


def _owner(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """Who holds an attribute: the module, or a config of its own, since modules share theirs."""
    *path, name = attribute.split(".")
    owner: Any = module
    for part in path:
        own = copy.copy(getattr(owner, part))
        setattr(owner, part, own)
        owner = own
    return owner, name


def _slice(model: nn.Module, rule: LocalArgument, plan: Plan, tp_rank: int) -> None:
    unit = plan.units[rule.unit]
    count = unit.count or 0
    index = _indices(spans([Section(count, 1, 1, unit.sharers)], tp_rank, plan.tp_size))

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(rule.argument)
        if isinstance(value, torch.Tensor):
            kwargs = {**kwargs, rule.argument: own_part(value, rule, count, index)}
        return args, kwargs

    for _, module in matching(model, rule.module):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def own_part(
    value: torch.Tensor, rule: LocalArgument, count: int, index: torch.Tensor
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
