"""The two ends of the vocabulary, its rows divided over the ranks.

The masked lookup is that of Megatron-LM (Shoeybi et al. 2019, section 3).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardkit.errors import ManifestError
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.linear import convert_class, is_plain_linear, mix_class
from shardkit.runtime.layers.product import OneProductLinear


class ParallelLMHead(nn.Linear):
    """Mixed into a linear class: each rank computes its own tokens' logits; one all-gather."""

    group: TensorParallelGroup
    sizes: tuple[int, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., vocabulary]`, the same on every rank."""
        # As rows: by the last token of each sequence, torch multiplies a copy of 16-bit weights.
        logits = super().forward(x.reshape(-1, x.shape[-1]))
        return self.group.all_gather(logits.view(*x.shape[:-1], logits.shape[-1]), self.sizes)


class VocabParallelEmbedding(nn.Embedding):
    """Mixed into an embedding class, whose scaling stays: a rank has its rows; one all-reduce."""

    group: TensorParallelGroup
    first_row: int
    rows: int

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids `[...]` to `[..., hidden]`, the same on every rank.

        Raises IndexError on a CPU for an id outside the vocabulary, as the whole layer would; on a
        GPU that would cost a synchronization, and the id's vector is zero. So it is in a compiled
        step, which reads what the model has chosen.
        """
        is_checked = input.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_checked and input.numel():
            low, high = int(input.min()), int(input.max())
            if low < 0 or high >= self.rows:
                raise IndexError(f"token ids {low} to {high}, but the vocabulary has {self.rows}")
        local = input - self.first_row
        is_local = (local >= 0) & (local < self.weight.shape[0])
        vectors = super().forward(local.where(is_local, 0), *args, **kwargs)
        return self.group.all_reduce(vectors * is_local.unsqueeze(-1))


def make_vocab_parallel(
    module: nn.Module, group: TensorParallelGroup, first_row: int, sizes: Sequence[int]
) -> None:
    """Turn an embedding or an output layer into its vocab-parallel form.

    Args:
        module: The layer.
        group: The ranks.
        first_row: The first row of the vocabulary that this rank holds.
        sizes: How many rows each rank holds.

    Raises:
        ManifestError: For a layer that has weights and no such form.
    """
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # only training uses it, and it may be another rank's row
        cls = mix_class(VocabParallelEmbedding, type(module))
        convert_class(module, cls, group=group, first_row=first_row, rows=sum(sizes))
    elif isinstance(module, nn.Linear):
        plain = OneProductLinear if is_plain_linear(module) else type(module)
        cls = mix_class(ParallelLMHead, plain)
        convert_class(module, cls, group=group, sizes=tuple(sizes))
    elif isinstance(getattr(module, "weight", None), torch.Tensor):
        raise ManifestError(f"{type(module).__name__}: a layer with no vocab-parallel form")
