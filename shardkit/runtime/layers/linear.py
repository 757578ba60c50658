"""The parallel modules: transformers' own layers with one collective each.

A module of the model built by transformers becomes one of these in place, keeping its parameters'
names; where only its widths change (column-parallel without a gather) it stays what it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardkit.errors import ManifestError
from shardkit.runtime.distributed.group import TensorParallelGroup


class ColumnParallelLinear(nn.Linear):
    """Each rank has its own output features, `y[..., rank's] = x W^T + b`; no collective."""


class RowParallelLinear(nn.Linear):
    """Each rank has its own input features; one all-reduce, then the bias, added once."""

    group: TensorParallelGroup

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's in]` to `[..., out]`, the same on every rank."""
        y = self.group.all_reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class RowParallelConv1D(nn.Module):
    """RowParallelLinear for weights stored `[in, out]` (transformers' Conv1D)."""

    group: TensorParallelGroup
    weight: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's in]` to `[..., out]`, the same on every rank."""
        return self.group.all_reduce(torch.matmul(x, self.weight)) + self.bias


class RowParallelSubclass(nn.Linear):
    """Mixed into a linear class with a forward of its own, which is called without its bias."""

    group: TensorParallelGroup

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's in]` to `[..., out]`, the same on every rank."""
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            y = self.group.all_reduce(super().forward(x))
        finally:
            self._parameters["bias"] = bias
        return y if bias is None else y + bias


class ParallelLMHead(nn.Linear):
    """Mixed into a linear class: each rank computes its own tokens' logits; one all-gather."""

    group: TensorParallelGroup
    sizes: tuple[int, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., vocabulary]`, the same on every rank."""
        return self.group.all_gather(super().forward(x), self.sizes)


class VocabParallelEmbedding(nn.Embedding):
    """Mixed into an embedding class, whose scaling stays: a rank has its rows; one all-reduce."""

    group: TensorParallelGroup
    first_row: int
    rows: int

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids `[...]` to `[..., hidden]`, the same on every rank.

        Raises IndexError on a CPU for an id outside the vocabulary, as the whole layer would; on a
        GPU that would cost a synchronisation, and the id's vector is zero.
        """
        if input.device.type == "cpu" and input.numel():
            low, high = int(input.min()), int(input.max())
            if low < 0 or high >= self.rows:
                raise IndexError(f"token ids {low} to {high}, but the vocabulary has {self.rows}")
        local = input - self.first_row
        mine = (local >= 0) & (local < self.weight.shape[0])
        found = super().forward(local.where(mine, 0), *args, **kwargs)
        return self.group.all_reduce(found * mine.unsqueeze(-1))


def make_row_parallel(module: nn.Module, group: TensorParallelGroup) -> None:
    """Turn a linear layer, or a module of bare expert weights, into its row-parallel form."""
    if _is_linear(module):
        convert_class(module, RowParallelLinear, group=group)
    elif is_conv1d(module):
        convert_class(module, RowParallelConv1D, group=group)
    elif isinstance(module, nn.Linear):
        convert_class(module, _mix_class(RowParallelSubclass, type(module)), group=group)
    else:
        module.register_forward_hook(_sum_output(group))


def make_vocab_parallel(
    module: nn.Module, group: TensorParallelGroup, first_row: int, sizes: Sequence[int]
) -> None:
    """Turn an embedding or an output layer into its vocab-parallel form."""
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # only training uses it, and it may be another rank's row
        cls = _mix_class(VocabParallelEmbedding, type(module))
        convert_class(module, cls, group=group, first_row=first_row, rows=sum(sizes))
    elif isinstance(module, nn.Linear):
        convert_class(
            module, _mix_class(ParallelLMHead, type(module)), group=group, sizes=tuple(sizes)
        )
    elif isinstance(getattr(module, "weight", None), torch.Tensor):
        raise ManifestError(f"{type(module).__name__}: a layer with no vocab-parallel form")


def make_column_parallel(module: nn.Module) -> None:
    """Name a plain linear layer for what it now is."""
    if _is_linear(module):
        convert_class(module, ColumnParallelLinear)


def fit_widths(module: nn.Module) -> None:
    """Set a layer's recorded widths to those of the weight it now has."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1:
        channels = module.weight.shape[0]
        module.groups = module.in_channels = module.out_channels = channels
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif is_conv1d(module) or isinstance(module, RowParallelConv1D):
        module.nx, module.nf = weight.shape  # type: ignore[assignment]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with `[in, out]` weights."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _mix_class(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """The class that is `cls` with the mixin's forward around its own; made once."""
    if cls in mixin.__mro__:
        return mixin
    if (mixin, cls) not in _made:
        _made[mixin, cls] = type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {})
    return _made[mixin, cls]


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def convert_class(module: nn.Module, cls: type[nn.Module], **state: object) -> None:
    """Give a module another class and what that class needs, its parameters untouched."""
    module.__class__ = cls
    for name, value in state.items():
        setattr(module, name, value)


def _sum_output(group: TensorParallelGroup) -> Any:
    """A forward hook that sums a module's partial output, the first of several, over the ranks."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (group.all_reduce(output[0]), *output[1:])
        return group.all_reduce(output)

    return hook
