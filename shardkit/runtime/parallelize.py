"""Makes a model that was built whole on the meta device into one rank's part of it.

As torch's `parallelize_module`, but from the placements of a manifest.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardkit.errors import LayoutError, ManifestError
from shardkit.layout import Span, Style, partition, rank_spans
from shardkit.layout.style import COLUMN, GATHER, NORM, PADDED, RECURRENT, ROW, VOCAB
from shardkit.planning import Placement, Plan, Rank
from shardkit.recipe import (
    ForwardArgument,
    ModuleAttribute,
    compile_module_pattern,
    list_words,
)
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.embedding import make_vocab_parallel
from shardkit.runtime.layers.linear import make_column_parallel, make_padded, make_row_parallel
from shardkit.runtime.layers.lstm import make_parallel_lstm
from shardkit.runtime.layers.norm import make_gathered, make_sharded_norm

LISTS = (nn.ModuleList, torch.Tensor)  # of which a rank keeps its own, once they are filled

Placements = Mapping[str, Placement]


def parallelize_model(
    model: nn.Module, plan: Plan, placements: Placements, group: TensorParallelGroup
) -> None:
    """Swap modules, shrink attributes and slice arguments for one rank.

    Args:
        model: The whole model, on the meta device.
        plan: What the manifest says.
        placements: For each of the model's own tensors, the placement on disk of what it is made
            of.
        group: The ranks.

    Raises:
        ManifestError: If the model is not the one that the manifest describes.
    """
    by_module: dict[str, dict[str, Placement]] = {}
    for name, placement in placements.items():
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, {})[leaf] = placement
    for path, tensors in by_module.items():
        _swap_module(model.get_submodule(path), path, tensors, group)
    rank = plan.mesh.rank(group.tp_rank)
    for attribute in plan.module_attributes:
        _set_attribute(model, attribute, plan, placements, rank)
    for argument in plan.forward_arguments:
        _slice_argument(model, argument, plan, rank)


@dataclass(frozen=True, slots=True)
class _Swap:
    """A module to be swapped, its tensors' placements, and the one that decides its form."""

    module: nn.Module
    path: str
    tensors: Placements
    placement: Placement
    group: TensorParallelGroup

    @property
    def spans(self) -> tuple[Span, ...]:
        """The features that this rank holds."""
        return tuple(rank_spans(self.placement.sections, self.group.tp_rank, self.group.tp_size))

    @property
    def width(self) -> int:
        """How many features all ranks hold."""
        return self.placement.spec.shape[self.placement.dim or 0]

    def rank_indices(self) -> list[torch.Tensor]:
        """For each rank, the indices of the sections that it holds."""
        sections, size = self.placement.sections, self.group.tp_size
        return [_span_indices(rank_spans(sections, tp_rank, size)) for tp_rank in range(size)]


def _swap_module(
    module: nn.Module, path: str, tensors: Placements, group: TensorParallelGroup
) -> None:
    """Give a module its parallel form, which follows from its weights' placements together.

    A module may hold tensors of several styles, a row-parallel weight beside a replicated bias.
    The first style of FORMS that one of them has decides; a bias that is not divided never does.
    """
    deciding = [p for leaf, p in tensors.items() if leaf != "bias" or p.dim is not None]
    by_style = {p.style: p for p in sorted(deciding, key=lambda p: p.dim is not None)}
    for style, make_form in FORMS.items():
        placement = by_style.get(style)
        if placement is not None and (placement.dim is not None or style.needs_full_width):
            make_form(_Swap(module, path, tensors, placement, group))
            return


def _make_vocab(swap: _Swap) -> None:
    rows = swap.rank_indices()
    first_row = int(rows[swap.group.tp_rank][0])
    make_vocab_parallel(swap.module, swap.group, first_row, [len(indices) for indices in rows])


def _make_recurrent(swap: _Swap) -> None:
    if not isinstance(swap.module, nn.LSTM):
        name = type(swap.module).__name__
        raise ManifestError(f"{swap.path}: {name} has no recurrent parallel form")
    make_parallel_lstm(swap.module, swap.path, swap.tensors, swap.group)


FORMS: dict[Style, Callable[[_Swap], None]] = {
    ROW: lambda swap: make_row_parallel(swap.module, swap.group, swap.spans),
    VOCAB: _make_vocab,
    NORM: lambda swap: make_sharded_norm(swap.module, swap.path, swap.group, swap.rank_indices()),
    GATHER: lambda swap: make_gathered(swap.module, swap.group, swap.rank_indices()),
    RECURRENT: _make_recurrent,
    PADDED: lambda swap: make_padded(swap.module, swap.width, swap.spans),
    COLUMN: lambda swap: make_column_parallel(swap.module),
}


def find_modules(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules a pattern names.

    Raises ManifestError if it names none, unless by `?`, or in a part of other classes of the type
    that this one lacks: the encoder, say, of a decoder.
    """
    compiled, is_empty = compile_module_pattern(pattern), True
    for name, module in model.named_modules():
        if compiled.fullmatch(name):
            is_empty = False
            yield name, module
    if is_empty and not pattern.endswith("?") and not _is_of_other_class(model, pattern):
        raise ManifestError(f"{type(model).__name__} has no module {pattern!r}")


def _is_of_other_class(model: nn.Module, pattern: str) -> bool:
    """Whether the outermost part of a pattern that a model lacks is known of its type's classes."""
    present = {part for name, _ in model.named_modules() for part in name.split(".")}
    lacking = next((word for word in re.findall(r"\w+", pattern) if word not in present), "")
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    return lacking in list_words(model_type)


def scale_count(full: int, unit: tuple[int, int], per_unit: tuple[int, int]) -> int:
    """`full`, scaled as its units are: by local over all of `unit`, all over local of `per_unit`.

    Raises LayoutError if that is not a whole number.
    """
    value, rest = divmod(full * unit[0] * per_unit[1], unit[1] * per_unit[0])
    if rest:
        raise LayoutError(f"{full} is not a multiple of {unit[1]} units")
    return value


def _set_attribute(
    model: nn.Module, rule: ModuleAttribute, plan: Plan, placements: Placements, rank: Rank
) -> None:
    for path, module in find_modules(model, rule.module):
        owner, name = _find_owner(module, rule.attribute.removesuffix("?"))
        full = getattr(owner, name, None)
        by_tensor = rule.is_counted_by_tensor
        is_absent = full is None or (by_tensor and f"{path}.{rule.unit}" not in placements)
        if isinstance(full, LISTS) or (is_absent and rule.attribute.endswith("?")):
            continue
        if type(full) is not int:
            raise ManifestError(f"{rule.module}: no integer attribute {name!r}")
        if by_tensor:
            local = len(_tensor_indices(full, rule, path, placements, rank))
        else:
            local = shrink_attribute(full, rule, plan, rank)
        setattr(owner, name, local)


def shrink_attribute(full: int, rule: ModuleAttribute, plan: Plan, rank: Rank) -> int:
    """An attribute's local value: scaled as its units are, or partitioned if they have no count.

    Raises LayoutError if that is not a whole number.
    """
    count = plan.units[rule.unit].count
    if count is None:
        block = plan.count_block(rule.unit, full)
        return len(partition(full, rank.tp_rank, rank.mesh.tp_size, block))
    per_unit = (1, 1)
    if rule.per_unit:
        divisor = plan.units[rule.per_unit].count or 0
        per_unit = plan.count_local_units(rule.per_unit, rank), divisor
    return scale_count(full, (plan.count_local_units(rule.unit, rank), count), per_unit)


def keep_local_units(model: nn.Module, plan: Plan, placements: Placements, rank: Rank) -> None:
    """Of lists of modules and of buffers that are divided, keep the rank's own, once filled.

    Raises ManifestError for one of another length.
    """
    for rule in plan.module_attributes:
        name = rule.attribute.removesuffix("?")
        for path, module in find_modules(model, rule.module):
            full = getattr(module, name, None)
            if isinstance(full, torch.Tensor):
                indices = _tensor_indices(full.shape[-1], rule, path, placements, rank)
                setattr(module, name, full.index_select(-1, indices.to(full.device)))
            elif isinstance(full, nn.ModuleList):
                setattr(module, name, _select_modules(full, rule, plan, rank))


def _select_modules(
    full: nn.ModuleList, rule: ModuleAttribute, plan: Plan, rank: Rank
) -> nn.ModuleList:
    unit = plan.units.get(rule.unit)
    if unit is None or len(full) != unit.count:
        raise ManifestError(f"{rule.module}.{rule.attribute}: {len(full)} modules")
    indices = _span_indices(plan.local_spans(rule.unit, rank))
    return nn.ModuleList(full[i] for i in indices.tolist())


def _span_indices(spans: Iterable[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in spans])


def _tensor_indices(
    full: int, rule: ModuleAttribute, path: str, placements: Placements, rank: Rank
) -> torch.Tensor:
    """The indices that a rank holds of the tensor along which an attribute is counted."""
    placement = placements.get(f"{path}.{rule.unit}")
    if placement is None or placement.dim is None or placement.spec.shape[placement.dim] != full:
        raise ManifestError(f"{path}.{rule.attribute}: {full} is not a length of a {rule.unit}")
    return _span_indices(placement.spans(rank))


def _find_owner(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """Who holds an attribute: the module, or a config of its own, since modules share theirs."""
    *path, name = attribute.split(".")
    owner: Any = module
    for part in path:
        private = copy.copy(getattr(owner, part))
        setattr(owner, part, private)
        owner = private
    return owner, name


def _slice_argument(model: nn.Module, rule: ForwardArgument, plan: Plan, rank: Rank) -> None:
    count = plan.units[rule.unit].count or 0
    indices = _span_indices(plan.local_spans(rule.unit, rank))

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(rule.argument)
        if isinstance(value, torch.Tensor):
            kwargs = {**kwargs, rule.argument: select_rank_units(value, rule, count, indices)}
        return args, kwargs

    for _, module in find_modules(model, rule.module):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def select_rank_units(
    value: torch.Tensor, rule: ForwardArgument, count: int, indices: torch.Tensor
) -> torch.Tensor:
    """The units of `value` along the rule's dimension that a rank holds.

    Args:
        value: A forward argument; along `rule.dim` it has `count` units, or outer axes times them,
            or one entry for all units (a mask that broadcasts), which is left as it is.
        rule: Where its units lie.
        count: How many there are in all.
        indices: Those that the rank holds.
    """
    indices = indices.to(value.device)
    if value.shape[rule.dim] == 1:
        return value
    if not rule.outer:
        return value.index_select(rule.dim, indices)
    shape = value.shape
    unfolded = value.reshape(*shape[: rule.dim], -1, count, *shape[rule.dim + 1 :])
    local = unfolded.index_select(rule.dim + 1, indices)
    return local.flatten(rule.dim, rule.dim + 1)
