"""The blocks of a model, and what each of them outputs in one run.

A block is an element of one of the model's outermost lists of layers, or of a list that is such an
element, which nothing calls; what is outside of them is in pieces of its own: the embedding, the
last norm, the output layer. A model without lists is its largest pieces. The model itself comes
last, as "".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

WHOLE = ""  # the name of the model itself, as `named_modules` has it


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of a block: in one run a block may be called several times, from 0."""

    block: str
    number: int

    def __str__(self) -> str:
        name = self.block or "the model's output"
        return f"{name}, call {self.number + 1}" if self.number else name


Visitor = Callable[[BlockCall, list[torch.Tensor]], Sequence[torch.Tensor | None]]
"""Is given a call and its floating-point outputs; returns what replaces each, None for nothing."""


def list_model_blocks(model: nn.Module) -> list[str]:
    """The names of a model's blocks and pieces, in the order the model has them."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{o}.") for o in lists)]
    above = {WHOLE} | {name[:at] for name in outermost for at, c in enumerate(name) if c == "."}
    return list(_iter_blocks(model, "", above | {*outermost}))


def _iter_blocks(module: nn.Module, path: str, above: set[str]) -> Iterator[str]:
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if full in above or isinstance(child, nn.ModuleList):
            yield from _iter_blocks(child, full, above)
        else:
            yield full


@contextmanager
def visit_blocks(model: nn.Module, blocks: Sequence[str], visit: Visitor) -> Iterator[None]:
    """In a `with`, each output of each block goes through a function, which may replace it."""
    calls: dict[str, int] = {}

    def after(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        call = BlockCall(name, calls.get(name, 0))
        calls[name] = call.number + 1
        tensors = list_float_tensors(output)
        values = visit(call, tensors)
        return output if all(v is None for v in values) else _replace_tensors(output, iter(values))

    modules = dict(model.named_modules())
    visited = [name for name in (*blocks, WHOLE) if name in modules]
    hooks = [modules[name].register_forward_hook(partial(after, name)) for name in visited]
    for name in visited:
        _call_captures_last(modules[name])
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call_captures_last(module: nn.Module) -> None:
    """Have transformers' own hooks run after all others.

    It captures hidden states by hooks that a model's first call adds: then they see what a visitor
    has passed on. In later calls they would run before it, so that models of which some have been
    called, and others not, would go on with different states.
    """
    hooks = module._forward_hooks
    for number, hook in list(hooks.items()):
        if (getattr(hook, "__module__", None) or "").startswith("transformers."):
            hooks[number] = hooks.pop(number)


@contextmanager
def find_plain_blocks(model: nn.Module, blocks: Sequence[str], plain: set[str]) -> Iterator[None]:
    """In a `with`, collects the blocks that output one tensor."""

    def after(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            plain.add(name)

    hooks = [model.get_submodule(n).register_forward_hook(partial(after, n)) for n in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def list_float_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a module's output, in order, without those of caches."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in list_float_tensors(item)]
    return []


def _replace_tensors(output: Any, values: Iterator[torch.Tensor | None]) -> Any:
    """The output with its floating-point tensors replaced, in the order they are listed."""
    if isinstance(output, torch.Tensor):
        value = next(values) if output.is_floating_point() else None
        return output if value is None else value
    if isinstance(output, Mapping):
        for name in list(output):
            output[name] = _replace_tensors(output[name], values)  # type: ignore[index]
        return output
    if isinstance(output, list | tuple):
        items = [_replace_tensors(item, values) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output
