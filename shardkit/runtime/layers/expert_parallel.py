"""Experts of which each rank has whole ones: every rank routes, runs its own, and sums once.

How a model runs its experts shows in what their module is and takes. One that holds a module for
each expert runs those that tokens are routed to: others' return zeros here. One that takes tokens,
their experts and the weights of these runs on the pairs of a token and an expert of this rank. One
that takes rows ordered by expert runs on its experts' rows.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.joint_sum import sum_output
from shardkit.runtime.layers.linear import convert_class, mix_class

COUNTS = ("num_experts", "num_routed_experts", "total_experts")  # attributes of experts' modules


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """Which of a stack's experts a rank has: those of `numbers`, of `count`."""

    numbers: range
    count: int


class AbsentExpert(nn.Module):
    """Mixed into an expert that another rank has: adds nothing to a sum of their outputs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape of its input `[..., hidden]`."""
        return torch.zeros_like(hidden_states)


class RoutedExperts(nn.Module):
    """Mixed into a module that takes tokens, the experts that each uses, and their weights."""

    group: TensorParallelGroup
    local: LocalExperts

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sum over each token's experts, `[..., hidden]`, the same on every rank.

        The arguments are those of the model's class: hidden states `[..., hidden]`, and for each
        token the numbers and weights of its experts, both `[tokens, experts per token]`. An expert
        after the last of the stack, which passes its input through, is run by rank 0.
        """
        if kwargs:
            args = inspect.signature(super().forward).bind(*args, **kwargs).args
        hidden, index, weights = args
        tokens, index = hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])
        numbers = self.local.numbers
        is_own = (index >= numbers.start) & (index < numbers.stop)
        if self.group.tp_rank == 0:
            is_own |= index >= self.local.count
        token, place = torch.where(is_own)
        output = torch.zeros_like(tokens)
        if len(token):
            own = index[token, place]
            number = torch.where(
                own < self.local.count, own - numbers.start, own - self.local.count + len(numbers)
            )
            share = weights.reshape(index.shape)[token, place]
            parts = super().forward(tokens[token], *self._pad_pairs(number, share))
            output.index_add_(0, token, parts.reshape(len(token), -1).to(output.dtype))
        return self.group.all_reduce(output).reshape(hidden.shape)

    def _pad_pairs(
        self, number: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert for each token, `[pairs, 1]`, and its weight.

        If experts that pass their input through end the stack, the last one is added, with no
        weight: the loop over such a stack fails for one expert per token.
        """
        if not (total := getattr(self, "total_experts", 0)):
            return number[:, None], share[:, None]
        last = torch.full_like(number, total - 1)
        return torch.stack((number, last), -1), torch.stack((share, torch.zeros_like(share)), -1)


class StackedExperts(nn.Module):
    """Mixed into a module that takes all tokens once for each expert, `[experts * tokens, in]`."""

    group: TensorParallelGroup
    local: LocalExperts

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[experts * tokens, out]`, of which the first expert's rows have the sum over experts.

        A model adds up the experts' outputs, so it does not matter in which of them the sum is; the
        others are zeros.
        """
        numbers, count = self.local.numbers, self.local.count
        each = rows.reshape(count, -1, rows.shape[-1])[numbers.start : numbers.stop]
        parts = super().forward(each.reshape(-1, rows.shape[-1]))
        total = self.group.all_reduce(parts.reshape(len(numbers), -1, parts.shape[-1]).sum(0))
        output = total.new_zeros(count, *total.shape)
        output[0] = total
        return output.reshape(-1, total.shape[-1])


class SortedExperts(nn.Module):
    """Mixed into a module that takes rows in the order of experts, and how many each has.

    The last of a mixture's such modules sums; what the others leave to others is zeros.
    """

    group: TensorParallelGroup
    local: LocalExperts
    sums: bool

    def forward(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """`[rows, in]` to `[rows, out]`; if this module sums, the same on every rank."""
        numbers = self.local.numbers
        start, stop = sum(sizes[: numbers.start]), sum(sizes[: numbers.stop])
        parts = super().forward(rows[start:stop], sizes[numbers.start : numbers.stop])
        output = parts.new_zeros(len(rows), parts.shape[-1])
        output[start:stop] = parts
        return self.group.all_reduce(output) if self.sums else output


FORMS: dict[int, type[nn.Module]] = {1: StackedExperts, 2: SortedExperts, 3: RoutedExperts}


def find_expert_form(module: nn.Module) -> type[nn.Module] | None:
    """The expert-parallel form of a module that holds stacks, by how many arguments it takes."""
    return FORMS.get(len(inspect.signature(module.forward).parameters))


def make_expert_parallel(
    module: nn.Module, group: TensorParallelGroup, local: LocalExperts, sums: bool
) -> None:
    """Turn a module that holds stacks of experts into its expert-parallel form.

    Args:
        module: A module that has one.
        group: The ranks.
        local: The experts of this rank.
        sums: Of modules that take sorted rows, whether its output is summed over the ranks.
    """
    form = find_expert_form(module)
    assert form is not None
    convert_class(module, mix_class(form, type(module)), group=group, local=local, sums=sums)
    for name in COUNTS:
        if isinstance(full := getattr(module, name, None), int):
            setattr(module, name, full - local.count + len(local.numbers))


def keep_local_experts(
    container: nn.Module, group: TensorParallelGroup, local: set[str]
) -> list[nn.Module]:
    """Of a module that holds a module for each expert, run a rank's own; sum its output.

    Args:
        container: A dictionary or list of modules with a forward of its own.
        group: The ranks.
        local: The names in it of the experts that this rank has.

    Returns:
        The others, which use no weights.
    """
    absent = [expert for name, expert in container.named_children() if name not in local]
    for expert in absent:
        convert_class(expert, mix_class(AbsentExpert, type(expert)))
    sum_output(container, group)
    return absent
