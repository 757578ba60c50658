"""Modules that need their whole width while a rank has a part of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardkit.errors import ManifestError
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.linear import convert_class

EPSILONS = ("variance_epsilon", "eps", "epsilon")


class ShardedRMSNorm(nn.Module):
    """Mixed into an RMS norm: its width is divided, and one small all-reduce finds the whole mean.

    An RMS norm (Zhang and Sennrich 2019) divides by `sqrt(mean(x^2) + eps)`. The class's own
    forward, whatever else its formula has, takes the mean over the rank's part, `m_part`, and so
    gives `w * x / sqrt(m_part + eps)`. Times `sqrt((m_part + eps) / (m_whole + eps))` that is
    `w * x / sqrt(m_whole + eps)`, what the whole norm gives. The whole mean is the sum over ranks
    of `share * x^2`, over the whole width, where an index that several ranks hold (kv heads) has
    the share one over their number.
    """

    group: TensorParallelGroup
    share: torch.Tensor
    width: int
    epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., rank's width]` to the same."""
        wide = x if x.dtype == torch.float64 else x.float()
        square = wide.square()
        share = self.share.to(x.device, square.dtype)
        whole = self.group.exact.all_reduce((square * share).sum(-1, keepdim=True)) / self.width
        scale = torch.sqrt((square.mean(-1, keepdim=True) + self.epsilon) / (whole + self.epsilon))
        part: torch.Tensor = super().forward(wide)
        return (part * scale).to(x.dtype)


def make_sharded_norm(
    module: nn.Module, path: str, group: TensorParallelGroup, parts: Sequence[torch.Tensor]
) -> None:
    """Turn an RMS norm into its sharded form; `parts` are the indices each rank holds.

    Raises ManifestError for a module that is no such norm: one with a bias, say.
    """
    epsilons = [getattr(module, name) for name in EPSILONS if hasattr(module, name)]
    if len(epsilons) != 1 or [name for name, _ in module.named_parameters()] != ["weight"]:
        raise ManifestError(
            f"{path}: {type(module).__name__} is not an RMS norm; use [gather] for it"
        )
    holders = torch.cat(list(parts)).bincount()
    share = holders[parts[group.tp_rank]].double().reciprocal().to(group.device)
    cls = type(f"ShardedRMSNorm[{type(module).__name__}]", (ShardedRMSNorm, type(module)), {})
    convert_class(
        module, cls, group=group, share=share, width=len(holders), epsilon=float(epsilons[0])
    )


def make_gathered(
    module: nn.Module, group: TensorParallelGroup, parts: Sequence[torch.Tensor]
) -> None:
    """Run a module whole: its inputs of a rank's width are gathered, its output is cut again.

    `parts` are the indices of the whole width that each rank holds, in the order it holds them.
    Inputs of one shape (what is normed, and its gate) are gathered together.
    """
    mine, order = parts[group.tp_rank].to(group.device), torch.cat(list(parts))
    sizes = [len(part) for part in parts]
    first = torch.full((int(order.max()) + 1,), -1)
    for at, index in enumerate(order.tolist()):
        first[index] = at if first[index] < 0 else first[index]
    first = first.to(group.device)  # once: a copy in each step would have a GPU wait

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = [*args, *kwargs.values()]
        local = [v for v in inputs if isinstance(v, torch.Tensor) and v.shape[-1:] == mine.shape]
        have_one_shape = len({value.shape for value in local}) == 1
        packs = [local] if have_one_shape else [[value] for value in local]
        whole = {
            id(value): gathered.index_select(-1, first.to(gathered.device))
            for pack in packs
            for value, gathered in zip(pack, _gather_tensors(pack, sizes, group), strict=True)
        }
        outputs = [whole.get(id(value), value) for value in inputs]
        return tuple(outputs[: len(args)]), dict(zip(kwargs, outputs[len(args) :], strict=True))

    def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_select(-1, mine.to(output.device))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _gather_tensors(
    pack: list[torch.Tensor], sizes: Sequence[int], group: TensorParallelGroup
) -> list[torch.Tensor]:
    """Tensors of one shape, each with every rank's part in its last dimension; one all-gather."""
    count = len(pack)
    gathered = group.all_gather(torch.cat(pack, -1), [count * size for size in sizes])
    ranks = torch.split(gathered, [count * size for size in sizes], -1)
    by_tensor = zip(*(rank.chunk(count, -1) for rank in ranks), strict=True)
    return [torch.cat(parts, -1).to(t.dtype) for t, parts in zip(pack, by_tensor, strict=True)]
