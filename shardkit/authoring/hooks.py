"""Runs a model once with forward hooks on some of its modules."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.runtime.model_runner import no_cache_options
from shardkit.verification.dummy_inputs import make_inputs

Hook = Callable[..., Any]  # as torch calls it: module, args, kwargs if asked for, output


def run_with_hooks(
    model: PreTrainedModel,
    hooks: Iterable[tuple[str, Hook]] = (),
    inputs: Mapping[str, torch.Tensor] | None = None,
    with_kwargs: bool = False,
) -> None:
    """Run one forward pass without a cache; the hooks are removed afterwards.

    Args:
        model: The model to run.
        hooks: A module's name and the forward hook to register on it, in the order to be called.
        inputs: The inputs of the forward pass; by default the model's dummy inputs.
        with_kwargs: Whether the hooks also receive the module's keyword arguments.
    """
    with ExitStack() as stack:
        for name, hook in hooks:
            module = model.get_submodule(name)
            handle = module.register_forward_hook(hook, with_kwargs=with_kwargs)
            stack.callback(handle.remove)
        model(**(make_inputs(model) if inputs is None else inputs), **no_cache_options(model))


def first_output(output: Any) -> Any:
    """The first tensor of a module's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output
