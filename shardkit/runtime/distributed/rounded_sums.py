"""Sums of which the ranks send each other rounded numbers, in half the bytes: arithmetic only.

Each rank's summand is rounded to a narrower dtype, and all are added in the wider one, in the order
of ranks. Over more than two ranks the sum travels, too, and is rounded likewise. So every rank has
the same bits, whatever carries them. A value is rounded by at most u, half a unit in the last place
of 1: 2^-8 in bfloat16 (IEEE 754, round to nearest). The sum of x_r is then off by at most
u (sum of |x_r|), over more than two ranks by (2 u + u^2) (sum of |x_r|), besides the wider dtype's
own rounding (Higham 2002, Accuracy and Stability of Numerical Algorithms, 2.2 and 4.2).
"""

from collections.abc import Sequence

import torch

from shardkit.dtypes import torch_name
from shardkit.errors import UsageError

REDUCE_DTYPES = (torch.bfloat16,)  # the range of float32: no sum overflows that would not in it


def check_reduce_dtype(dtype: torch.dtype | None) -> None:
    """Raise UsageError for a dtype that sums are not sent in; None is their own."""
    if dtype is not None and dtype not in REDUCE_DTYPES:
        names = " or ".join(map(str, REDUCE_DTYPES))
        raise UsageError(f"reduce_dtype is {torch_name(dtype)!r}; it must be {names}, or None")


def is_wider(dtype: torch.dtype, sent: torch.dtype) -> bool:
    """Whether numbers of a dtype take more bytes than those that would be sent."""
    return dtype.is_floating_point and dtype.itemsize > sent.itemsize


def add_rounded(
    parts: Sequence[torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of every rank's rounded summand, in a wider dtype, in a new tensor or in `out`.

    Example:
        >>> add_rounded([torch.ones(1, dtype=torch.bfloat16)] * 3, torch.float32)
        tensor([3.])
    """
    total = parts[0].to(dtype) if out is None else out.copy_(parts[0])
    for part in parts[1:]:
        total += part
    return total.copy_(total.to(parts[0].dtype)) if len(parts) > 2 else total
