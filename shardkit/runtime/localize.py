"""Makes a model built whole on the meta device into one rank's part of it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shardkit.errors import LayoutError, ManifestError
from shardkit.layout import Section, spans
from shardkit.manifest import Manifest
from shardkit.plan import Placement, Plan
from shardkit.recipe import LocalArgument, LocalAttribute, module_pattern
from shardkit.runtime import layers
from shardkit.runtime.group import TensorParallelGroup


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
    styles: dict[str, tuple[str, Placement]] = {}
    for name, placement in placed.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or module not in styles:
            styles[module] = (leaf, placement)
    for path, (_, placement) in styles.items():
        _swap(model.get_submodule(path), placement, group)
    for attribute in manifest.plan.attributes:
        _shrink(model, attribute, manifest.plan, group.tp_rank)
    for argument in manifest.plan.arguments:
        _slice(model, argument, manifest.plan, group.tp_rank)


def _swap(module: nn.Module, placement: Placement, group: TensorParallelGroup) -> None:
    if placement.style == "row":
        layers.make_row_parallel(module, group)
    elif placement.style == "column":
        layers.make_column_parallel(module)
    elif placement.style == "vocab" and placement.dim is not None:
        held = [placement.spans(rank, group.tp_size) for rank in range(group.tp_size)]
        sizes = [sum(stop - start for start, stop in parts) for parts in held]
        layers.make_vocab_parallel(module, group, held[group.tp_rank][0].start, sizes)


def matching(model: nn.Module, pattern: str) -> Iterator[nn.Module]:
    """The modules a pattern names.  Raises ManifestError where it names none."""
    compiled, found = module_pattern(pattern), False
    for name, module in model.named_modules():
        if compiled.fullmatch(name):
            found = True
            yield module
    if not found:
        raise ManifestError(f"{type(model).__name__} has no module {pattern!r}")


def local_value(full: int, times: tuple[int, int], per: tuple[int, int]) -> int:
    """`full`, scaled as its units are: by local over all of `times`, and all over local of `per`.

    Raises LayoutError where that is no whole number.
    """
    value, rest = divmod(full * times[0] * per[1], times[1] * per[0])
    if rest:
        raise LayoutError(f"{full} is no multiple of {times[1]} units")
    return value


def _shrink(model: nn.Module, rule: LocalAttribute, plan: Plan, tp_rank: int) -> None:
    times = plan.local(rule.times, tp_rank), plan.units[rule.times].count or 0
    per = (1, 1)
    if rule.per:
        per = plan.local(rule.per, tp_rank), plan.units[rule.per].count or 0
    for module in matching(model, rule.module):
        owner, name = _owner(module, rule.attribute)
        full = getattr(owner, name, None)
        if type(full) is not int:
            raise ManifestError(f"{rule.module}: no integer attribute {rule.attribute!r}")
        setattr(owner, name, local_value(full, times, per))


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
    held = spans([Section(count, 1, 1, unit.sharers)], tp_rank, plan.tp_size)
    index = torch.cat([torch.arange(start, stop) for start, stop in held])

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(rule.argument)
        if isinstance(value, torch.Tensor):
            kwargs = {**kwargs, rule.argument: own_part(value, rule, count, index)}
        return args, kwargs

    for module in matching(model, rule.module):
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
