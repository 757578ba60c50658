"""The product of a linear layer on a CPU: oneDNN's, if torch's own leaves much of it unused.

torch multiplies float32 by MKL, which on AMD's processors leaves AVX-512 unused: oneDNN takes half
as long for all but one row, with or without other threads. Both are parts of torch, and both round
in float32; they add in another order.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

CPU_INFO = Path("/proc/cpuinfo")
MIN_PRODUCTS = 1 << 19  # of numbers; to begin takes oneDNN 10 us, MKL 1


class OneProductLinear(nn.Linear):
    """A linear layer of `multiply_weight`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        return multiply_weight(x, self.weight, self.bias)


def multiply_weight(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `F.linear`: `x W^T + b`.

    Example:
        >>> multiply_weight(torch.ones(1, 2), torch.ones(3, 2))
        tensor([[2., 2., 2.]])
    """
    if x.dtype is weight.dtype is torch.float32 and _is_for_onednn(x, weight):
        # torch.compile takes oneDNN's operator of weights alone that it has made constants.
        take_product = _onednn_op if torch.compiler.is_compiling() else _multiply_by_onednn
        return take_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _multiply_by_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@torch.library.custom_op("shardkit::linear", mutates_args=())
def _onednn_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product as an operator that torch.compile leaves as it is."""
    return _multiply_by_onednn(x, weight, bias)


@_onednn_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether its product can be taken, which has no gradient, and is worth it."""
    if not x.is_cpu or not weight.is_cpu:
        return False
    if x.numel() * weight.shape[0] < MIN_PRODUCTS:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    allows: bool = _allows_onednn()
    return allows


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's has no types
def _allows_onednn() -> bool:
    return prefers_onednn() and bool(torch.backends.mkldnn.enabled)


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL here: on AMD's processors with AVX-512."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in CPU_INFO.read_text()
    except OSError:
        return False
