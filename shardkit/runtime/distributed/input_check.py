"""Every rank must receive the same inputs and sample the same tokens; makes sure that they do."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.runtime.distributed.group import TensorParallelGroup

MAX_DESCRIPTION = 400  # characters of a description of inputs


def coordinate_calls(
    model: PreTrainedModel, group: TensorParallelGroup, check_inputs: bool = False
) -> None:
    """Give a model's calls what must happen on every rank before them.

    Before each `generate`, every rank takes rank 0's random state. With `check_inputs`, the ranks
    also compare their inputs before each forward and generate: one small collective for each call,
    not for each step of a generate. Inputs that differ would give wrong numbers without an error,
    or abort a rank.

    Args:
        model: This rank's part of the model, which is changed in place.
        group: The ranks.
        check_inputs: Whether inputs that differ raise RanksError, on every rank.
    """
    if group.tp_size == 1:
        return
    generating = False

    def check_forward(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # A compiled step is a part of a generate, and must not depend on what it was compiled in.
        if not (torch.compiler.is_compiling() or generating):
            check_same_inputs(group, "forward", args, kwargs)

    if check_inputs:
        model.register_forward_pre_hook(check_forward, with_kwargs=True)
    if not model.can_generate():
        return
    generate = model.generate

    def generate_in_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal generating
        if check_inputs:
            check_same_inputs(group, "generate", args, kwargs)
        sync_rng(group)
        generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            generating = False

    model.generate = generate_in_step


def check_same_inputs(
    group: TensorParallelGroup, call: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise RanksError on every rank unless all make the same call with the same tensors."""
    values = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    report = {
        "call": call,
        "inputs": describe_tensors(tensors),
        "input values": hash_tensors(tensors),
    }
    group.all_agree(report, by_store=False)


def sync_rng(group: TensorParallelGroup) -> None:
    """Give every rank rank 0's random state, so that all of them sample the same tokens."""
    torch.set_rng_state(group.broadcast(torch.get_rng_state()).cpu())
    if group.device.type == "cuda":
        state = group.broadcast(torch.cuda.get_rng_state(group.device)).cpu()
        torch.cuda.set_rng_state(state, group.device)


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names, dtypes and shapes in words: `input_ids int64 [2, 3]`."""
    descriptions = [
        f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for name, value in tensors.items()
    ]
    return ", ".join(descriptions)[:MAX_DESCRIPTION]


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of the values."""
    digest = hashlib.sha256()
    for value in tensors.values():
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()
