"""The parallel modules: transformers' own layers with one collective each.

A module of the model built by transformers becomes one of these in place, keeping its parameters'
names; where only its widths change (column-parallel without a gather) it stays what it is.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardkit.errors import ManifestError
from shardkit.runtime.group import TensorParallelGroup


class ColumnParallelLinear(nn.Linear):
    """`y[..., rank's columns] = x W^T + b`: each rank has its own output features, no collective."""


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


@cache
def vocab_parallel(cls: type[nn.Embedding]) -> type[nn.Embedding]:
    """`cls` with its rows divided: what the class itself does (scaling) stays; one all-reduce."""

    class VocabParallelEmbedding(cls):  # type: ignore[misc, valid-type]
        """Each rank looks up its own rows and adds zeros for the others'."""

        group: TensorParallelGroup
        first_row: int
        rows: int

        def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """Token ids `[...]` to `[..., hidden]`, the same on every rank.

            Raises IndexError on a CPU for an id outside the vocabulary, as the whole layer would;
            on a GPU that would cost a synchronisation, and the id's vector is zero.
            """
            if input_ids.device.type == "cpu" and input_ids.numel():
                low, high = int(input_ids.min()), int(input_ids.max())
                if low < 0 or high >= self.rows:
                    raise IndexError(
                        f"token ids {low} to {high}, but the vocabulary has {self.rows}"
                    )
            local = input_ids - self.first_row
            mine = (local >= 0) & (local < self.weight.shape[0])
            found = super().forward(local.where(mine, 0), *args, **kwargs)
            return self.group.all_reduce(found * mine.unsqueeze(-1))

    return VocabParallelEmbedding


@cache
def lm_head(cls: type[nn.Linear]) -> type[nn.Linear]:
    """`cls` with its output features, the vocabulary, divided: one all-gather of the logits."""

    class ParallelLMHead(cls):  # type: ignore[misc, valid-type]
        """Each rank computes its own tokens' logits; every rank returns all of them."""

        group: TensorParallelGroup
        sizes: tuple[int, ...]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """`[..., in]` to `[..., vocabulary]`, the same on every rank."""
            return self.group.all_gather(super().forward(x), self.sizes)

    return ParallelLMHead


@cache
def row_parallel(cls: type[nn.Linear]) -> type[nn.Linear]:
    """A linear class with a forward of its own, in its row-parallel form."""

    class RowParallelSubclass(cls):  # type: ignore[misc, valid-type]
        """The class's own product without its bias; one all-reduce; then the bias."""

        group: TensorParallelGroup

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """`[..., rank's in]` to `[..., out]`, the same on every rank."""
            bias, self._parameters["bias"] = self._parameters["bias"], None
            try:
                y = self.group.all_reduce(super().forward(x))
            finally:
                self._parameters["bias"] = bias
            return y if bias is None else y + bias

    return RowParallelSubclass


def make_row_parallel(module: nn.Module, group: TensorParallelGroup) -> None:
    """Turn a linear layer, or a module of bare expert weights, into its row-parallel form."""
    if _is_linear(module):
        _become(module, RowParallelLinear, group=group)
    elif is_conv1d(module):
        _become(module, RowParallelConv1D, group=group)
    elif isinstance(module, nn.Linear):
        _become(module, row_parallel(type(module)), group=group)
    else:
        module.register_forward_hook(_summed(group))


def make_vocab_parallel(
    module: nn.Module, group: TensorParallelGroup, first_row: int, sizes: Sequence[int]
) -> None:
    """Turn an embedding or an output layer into its vocab-parallel form."""
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # only training uses it, and it may be another rank's row
        _become(
            module, vocab_parallel(type(module)), group=group, first_row=first_row, rows=sum(sizes)
        )
    elif isinstance(module, nn.Linear):
        _become(module, lm_head(type(module)), group=group, sizes=tuple(sizes))
    elif isinstance(getattr(module, "weight", None), torch.Tensor):
        raise ManifestError(f"{type(module).__name__}: a layer with no vocab-parallel form")


def make_column_parallel(module: nn.Module) -> None:
    """Name a plain linear layer for what it now is."""
    if _is_linear(module):
        _become(module, ColumnParallelLinear)


def fit_widths(module: nn.Module) -> None:
    """Set a layer's recorded widths to those of the weight it now has."""
    weight = getattr(module, "weight", None)
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


def _become(module: nn.Module, cls: type[nn.Module], **state: object) -> None:
    """Give a module another class and what that class needs, its parameters untouched."""
    module.__class__ = cls
    for name, value in state.items():
        setattr(module, name, value)


def _summed(group: TensorParallelGroup) -> Any:
    """A forward hook that sums a module's partial output, the first of several, over the ranks."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (group.all_reduce(output[0]), *output[1:])
        return group.all_reduce(output)

    return hook
