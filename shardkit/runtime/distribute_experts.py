"""Makes a model's experts those of one rank, if each rank has whole ones."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from shardkit.errors import ManifestError
from shardkit.layout import partition
from shardkit.layout.style import EXPERT
from shardkit.planning import Placement, Rank
from shardkit.runtime.conversion import Conversion
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.expert_parallel import (
    LocalExperts,
    find_expert_form,
    keep_local_experts,
    make_expert_parallel,
)
from shardkit.runtime.materialize import set_tensor

Conversions = Mapping[str, Conversion]
Placements = Mapping[str, Placement]


def distribute_experts(
    model: PreTrainedModel,
    conversions: Conversions,
    placements: Placements,
    rank: Rank,
    group: TensorParallelGroup,
) -> None:
    """Swap the modules that run experts, and leave out what only other ranks have.

    Args:
        model: The whole model, on the meta device.
        conversions: What makes each of the model's tensors.
        placements: Where the tensors on disk lie, by name.
        rank: The rank.
        group: The ranks.

    Raises:
        ManifestError: If a module runs its experts in a way that has no expert-parallel form.
    """
    stacks: dict[str, list[LocalExperts]] = {}
    containers: dict[str, set[str]] = {}
    for name, conversion in conversions.items():
        first = placements[conversion.sources[0][0]]
        if first.style is not EXPERT:
            continue
        if first.expert is not None and conversion.converter is None:
            path, child = _find_container(model, name, first)
            names = containers.setdefault(path, set())
            if first.expert.is_on(rank):
                names.add(child)
            continue
        local = find_local_experts(conversion, placements, rank)
        stacks.setdefault(_find_stack_module(model, name), []).append(local)
        _check_count(model, name, local, first)
        if not local.numbers:
            _empty_parameters(model, [name], group.device)
    for path, names in containers.items():
        for expert in keep_local_experts(model.get_submodule(path), group, names):
            _empty_parameters(expert, [name for name, _ in expert.named_parameters()], group.device)
    for path, every in stacks.items():
        module = model.get_submodule(path)
        fewest = min(every, key=lambda local: local.count)
        make_expert_parallel(module, group, fewest, _is_last(path, model, stacks))


def _empty_parameters(module: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Make parameters that this rank has nothing of ones without elements."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        full = module.get_parameter(name)
        nothing = torch.empty(0, *full.shape[1:], dtype=full.dtype, device=device)
        set_tensor(module.get_submodule(path), leaf, nothing)


def find_local_experts(conversion: Conversion, placements: Placements, rank: Rank) -> LocalExperts:
    """The experts that a rank has of one of the model's stacks."""
    name, pattern = conversion.sources[0]
    if placements[name].expert is None:
        count = placements[name].sections[0].units
        return LocalExperts(partition(count, rank.ep_rank, rank.mesh.ep_size), count)
    own = [placements[source].spans(rank) for source, each in conversion.sources if each == pattern]
    numbers = [number for number, spans in enumerate(own) if spans]
    if not numbers:
        return LocalExperts(range(0), len(own))
    return LocalExperts(range(numbers[0], numbers[-1] + 1), len(own))


def _check_count(model: nn.Module, name: str, local: LocalExperts, placement: Placement) -> None:
    """Raise ManifestError if experts stored one by one make more than one of a model's stacks."""
    length = model.get_parameter(name).shape[0]
    if placement.expert is not None and length != local.count:
        raise ManifestError(
            f"{name}: is of {length} of the {local.count} experts that {placement.spec.name} is one"
            " of, which cannot be whole on a rank; split without --expert-parallel"
        )


def _find_container(model: nn.Module, name: str, placement: Placement) -> tuple[str, str]:
    """The module that holds one for each expert, and what it calls this one."""
    path = name.split(".")
    names = placement.expert.module_names if placement.expert else ()
    at = next((at for at in reversed(range(len(path))) if path[at] in names), 0)
    container = ".".join(path[:at])
    if not at or type(model.get_submodule(container)).forward is nn.Module.forward:
        raise _refuse(name, model)
    return container, path[at]


def _find_stack_module(model: nn.Module, name: str) -> str:
    """The innermost module around a stack that is told which tokens its experts run on."""
    path = name.rpartition(".")[0]
    while path:
        if find_expert_form(model.get_submodule(path)) is not None:
            return path
        path = path.rpartition(".")[0]
    raise _refuse(name, model)


def _refuse(name: str, model: nn.Module) -> ManifestError:
    return ManifestError(
        f"{name}: {type(model).__name__} runs its experts in a way that has no expert-parallel"
        " form; split without --expert-parallel"
    )


def _is_last(path: str, model: nn.Module, stacks: Mapping[str, object]) -> bool:
    """Of modules of one mixture that each take sorted rows, whether this one runs last."""
    parent = path.rpartition(".")[0]
    names = [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
    return path == [name for name in names if name in stacks][-1]
