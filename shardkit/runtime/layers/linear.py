"""Column- and row-parallel linear layers: transformers' own layers with one collective each.

A module of the model that transformers builds becomes one of these in place, keeping its
parameters' names. If only its widths change (column-parallel without a gather) it stays what it is.
Column and row parallelism are those of Megatron-LM (Shoeybi et al. 2019, section 3).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardkit.layout import Span
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.joint_sum import sum_output
from shardkit.runtime.layers.product import OneProductLinear, multiply_weight


class ColumnParallelLinear(OneProductLinear):
    """Each rank has its own output features, `y[..., rank's] = x W^T + b`; no collective."""


class RowParallelLinear(nn.Linear):
    """Each rank has its own input features; one all-reduce, then the bias, added once."""

    group: TensorParallelGroup
    spans: Sequence[Span]  # the rank's features, of inputs that are padded to the whole width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's in]`, or `[..., in]`, to `[..., out]`, the same on every rank."""
        if x.shape[-1] != self.weight.shape[-1]:
            x = torch.cat([x[..., start:stop] for start, stop in self.spans], -1)
        y = self.group.all_reduce(multiply_weight(x, self.weight))
        return y if self.bias is None else self.group.add_once(y, self.bias)


class RowParallelConv1D(nn.Module):
    """RowParallelLinear for weights stored `[in, out]` (transformers' Conv1D)."""

    group: TensorParallelGroup
    weight: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's in]` to `[..., out]`, the same on every rank."""
        y = self.group.all_reduce(torch.matmul(x, self.weight))
        return self.group.add_once(y, self.bias)


class RowParallelSubclass(nn.Linear):
    """Mixed into a linear class with a forward of its own, which then has no bias to add.

    Once the weights are loaded, `detach_bias` keeps the bias apart, to be added after the sum.
    """

    group: TensorParallelGroup
    summed_bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's in]` to `[..., out]`, the same on every rank."""
        y = self.group.all_reduce(super().forward(x))
        return y if self.summed_bias is None else self.group.add_once(y, self.summed_bias)

    def detach_bias(self) -> None:
        """Move the bias, if there is one, to where the class's own forward does not see it."""
        bias = self._parameters.get("bias")
        if bias is not None:
            self._parameters["bias"] = None
            self._buffers["summed_bias"] = bias


def make_row_parallel(
    module: nn.Module, group: TensorParallelGroup, spans: Sequence[Span] = ()
) -> None:
    """Turn a linear layer, or a module of bare expert weights, into its row-parallel form.

    `spans` are the rank's features of all ranks'.
    """
    if is_plain_linear(module):
        convert_class(module, RowParallelLinear, group=group, spans=spans)
    elif is_conv1d(module):
        convert_class(module, RowParallelConv1D, group=group)
    elif isinstance(module, nn.Linear):
        convert_class(module, mix_class(RowParallelSubclass, type(module)), group=group)
        module.register_buffer("summed_bias", None, persistent=False)
    else:
        sum_output(module, group)


def make_column_parallel(module: nn.Module) -> None:
    """Name a plain linear layer for what it now is."""
    if is_plain_linear(module):
        convert_class(module, ColumnParallelLinear)


def make_padded(module: nn.Module, width: int, spans: Sequence[Span]) -> None:
    """Have a column-parallel layer output the whole width: zeros where other ranks' features are.

    For modules that take the width of a head from the width of their inputs, and so must have all
    heads: those of zeros output zeros.
    """

    def pad(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        whole = output.new_zeros(*output.shape[:-1], width)
        parts = torch.split(output, [stop - start for start, stop in spans], -1)
        for (start, stop), part in zip(spans, parts, strict=True):
            whole[..., start:stop] = part
        return whole

    make_column_parallel(module)
    module.register_forward_hook(pad)


def finish_layer(module: nn.Module) -> None:
    """Once a layer has its weights: set its recorded widths to theirs, and detach a summed bias."""
    weight = getattr(module, "weight", None)
    if isinstance(module, RowParallelSubclass):
        module.detach_bias()
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


def mix_class(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """The class that is `cls` with the mixin's forward around its own; made once.

    A subclass made at run time keeps whatever forward a model's own layer has, as
    torch.nn.utils.parametrize does to keep a module's behavior.
    """
    if cls in mixin.__mro__:
        return mixin
    if (mixin, cls) not in _mixed_classes:
        _mixed_classes[mixin, cls] = type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {})
    return _mixed_classes[mixin, cls]


_mixed_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def convert_class(module: nn.Module, cls: type[nn.Module], **state: object) -> None:
    """Give a module another class and what that class needs, its parameters untouched."""
    module.__class__ = cls
    for name, value in state.items():
        setattr(module, name, value)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module multiplies as torch's linear layer does."""
    forwards = nn.Linear.forward, OneProductLinear.forward
    return isinstance(module, nn.Linear) and type(module).forward in forwards
