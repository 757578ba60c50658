"""Which of transformers' kernels suits a mixture's experts, as wide as they are here."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.dtypes import torch_name
from shardkit.runtime.packed import PackedTensor

GROUPED_ALIGNMENT = 16  # bytes a row must be a multiple of for torch's grouped matmul


def choose_expert_kernel(model: PreTrainedModel) -> str:
    """Use transformers' plain loop if stacked experts do not suit torch's grouped matmul.

    The grouped kernel wants 16-byte rows, which a rank's width may not give, and no float64. And it
    takes all experts: of packed ones, the loop computes only those that tokens are routed to.
    Returns which experts do not suit it, in words; nothing if all do, or are packed.
    """
    experts = list(iter_stacked_experts(model))
    plain = [p for p in experts if not isinstance(p, PackedTensor)]
    unsuited = [(width, torch_name(p.dtype)) for p in plain for width in _find_unsuited_widths(p)]
    if not unsuited and len(plain) == len(experts):
        return ""
    model.set_experts_implementation("eager")
    for module in _iter_expert_modules(model):
        module.config._experts_implementation = "eager"  # some have a copy, of their layer's config
    if not unsuited:
        return ""
    width, dtype = min(unsuited)
    return f"{width} wide in {dtype}"


def describe_slow_experts(notes: Sequence[str]) -> str:
    """One line that warns of what `choose_expert_kernel` returned, on any rank."""
    return (
        f"experts {' and '.join(notes)} do not suit torch's grouped matmul (rows of"
        f" {GROUPED_ALIGNMENT} bytes, no float64): transformers' plain loop runs them, more slowly"
    )


def iter_stacked_experts(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """The weights `[experts, …, …]` of modules whose kernel transformers lets one choose."""
    for module in _iter_expert_modules(model):
        yield from (p for p in module.parameters(recurse=False) if p.ndim == 3)


def _iter_expert_modules(model: PreTrainedModel) -> Iterator[Any]:
    return (m for m in model.modules() if hasattr(m, "has_gate"))  # as transformers marks them


def _find_unsuited_widths(experts: torch.Tensor) -> list[int]:
    size, wide = experts.element_size(), experts.dtype == torch.float64
    return [width for width in experts.shape[1:] if wide or width * size % GROUPED_ALIGNMENT]
