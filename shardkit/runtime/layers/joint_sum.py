"""One all-reduce for several modules: each leaves its summand to the one that sums.

A row-parallel module sums by its group. In a joint sum it has a group of one of these kinds
instead, so no form of a layer knows of joint sums.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardkit.errors import ManifestError
from shardkit.runtime.distributed.group import TensorParallelGroup

Summands = dict[str, torch.Tensor | None]  # what earlier modules have left, by their names


class SummandGroup(TensorParallelGroup):
    """The group as a module has it that takes part in a joint sum.

    Attributes:
        separate: The group that the module has if each module sums for itself.
    """

    def __init__(self, group: TensorParallelGroup, separate: TensorParallelGroup) -> None:
        """See `group`, of which other sums may be made."""
        super().__init__(group.tp_rank, group.tp_size, group.device, counts=group.counts)
        self.separate = separate


class PartialGroup(SummandGroup):
    """The group as a module has it around which another one sums: each rank keeps its part."""

    def __init__(self, group: TensorParallelGroup) -> None:
        """See `group` without its sums."""
        super().__init__(group, group)

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """This rank's summand itself."""
        return x

    def add_once(self, y: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """On rank 0 `y + term`, since the others' are summed with it; on these `y`."""
        return y + term if self.tp_rank == 0 else y


class EarlierGroup(SummandGroup):
    """The group as a module has it whose summand is added to that of a later one."""

    def __init__(self, group: TensorParallelGroup, name: str, summands: Summands) -> None:
        """Leave what is to be summed in `summands`, under `name`."""
        super().__init__(group, group)
        self._name, self._summands = name, summands

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """Zeros: the later module outputs the sum of both."""
        self._summands[self._name] = x
        return torch.zeros_like(x)


class JointGroup(SummandGroup):
    """The group as the module has it that sums: its own summand and those of earlier ones."""

    def __init__(
        self, group: TensorParallelGroup, separate: TensorParallelGroup, summands: Summands
    ) -> None:
        """Sum over `group` what is in `summands`, too, by the names of its keys."""
        super().__init__(group, separate)
        self._group, self._summands = group, summands

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """The sum over the ranks of `x` and of what earlier modules have left.

        Raises:
            ManifestError: If one of them has not run, or what it left has another size: the model
                does not run them as the manifest says.
            RanksError: A rank died, stalled or left.
        """
        for name, summand in self._summands.items():
            if summand is None or summand.numel() != x.numel():
                problem = "has not run" if summand is None else f"output {[*summand.shape]}"
                raise ManifestError(
                    f"joint_sums: {name} {problem} before {[*x.shape]} is to be summed with it"
                )
            x = x + summand.reshape(x.shape).to(x.dtype)
            self._summands[name] = None
        return self._group.all_reduce(x, sent_as)


def sum_output(module: nn.Module, group: TensorParallelGroup) -> None:
    """Have a module's output, or the first of several, summed by the group that it has."""

    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (find_group(module).all_reduce(output[0]), *output[1:])
        return find_group(module).all_reduce(output)

    set_group(module, group)
    module.register_forward_hook(hook)


def find_group(module: nn.Module) -> TensorParallelGroup:
    """The group that a module sums over."""
    group = module.group
    assert isinstance(group, TensorParallelGroup)
    return group


def set_group(module: nn.Module, group: TensorParallelGroup) -> None:
    """Give a module the group that it sums over."""
    module.group = group  # type: ignore[assignment]


@contextmanager
def separate_sums(modules: Iterable[nn.Module]) -> Iterator[None]:
    """In a `with`, each of a model's modules sums for itself: what it outputs can be compared."""
    every = ((module, getattr(module, "group", None)) for module in modules)
    joint = [(module, group) for module, group in every if isinstance(group, SummandGroup)]
    for module, group in joint:
        set_group(module, group.separate)
    try:
        yield
    finally:
        for module, group in joint:
            set_group(module, group)
