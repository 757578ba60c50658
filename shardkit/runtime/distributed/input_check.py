"""Ranks that are called from outside must all be called alike: what they compute is one model."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.runtime.distributed.group import TensorParallelGroup

SHOWN = 400  # characters of a description of inputs


def called_alike(model: PreTrainedModel, group: TensorParallelGroup) -> None:
    """Have the ranks compare their inputs at each forward and generate, before they use them.

    One small collective for each call, not for each step of a generate.  Inputs that differ would
    give wrong numbers without an error, or abort a rank: they raise RanksError on every rank.
    """
    if group.tp_size == 1:
        return
    inside = False

    def before(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not inside:
            compare(group, "forward", args, kwargs)

    model.register_forward_pre_hook(before, with_kwargs=True)
    if not model.can_generate():
        return
    generate = model.generate

    def generate_alike(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        compare(group, "generate", args, kwargs)
        inside = True
        try:
            return generate(*args, **kwargs)
        finally:
            inside = False

    model.generate = generate_alike


def compare(
    group: TensorParallelGroup, call: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise RanksError on every rank unless all are called with the same inputs."""
    given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    tensors = {name: v for name, v in given.items() if isinstance(v, torch.Tensor)}
    group.agree(
        {"call": call, "inputs": described(tensors), "input values": digest(tensors)},
        by_store=False,
    )


def described(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names, dtypes and shapes in words: `input_ids int64 [2, 3]`."""
    told = [
        f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for name, value in tensors.items()
    ]
    return ", ".join(told)[:SHOWN]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of the values."""
    found = hashlib.sha256()
    for value in tensors.values():
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(plain.numpy().tobytes())
    return found.hexdigest()
