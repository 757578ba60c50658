"""Which blocks are run, if not all: drawn from a seed, and what must run in any case."""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardkit.verification.blocks import BlockCall
from shardkit.verification.numerics_options import NumericsOptions


def choose_skips(
    model: nn.Module, blocks: Sequence[str], plain: Collection[str], options: NumericsOptions
) -> frozenset[str]:
    """The blocks that ranks need not run: of repeated layers neither the last nor those drawn.

    Args:
        model: The model.
        blocks: Its blocks, in the order it has them.
        plain: Those of them that output one tensor.
        options: How many to run, and what to draw them from.
    """
    if options.sample is None:
        return frozenset()
    last = {name.rpartition(".")[0]: name for name in _list_layers(blocks, plain)}
    others = [n for n in list_repeated(model, blocks, plain) if n not in last.values()]
    drawn = random.Random(options.seed).sample(others, min(options.sample, len(others)))
    return frozenset(others) - frozenset(drawn)


def list_repeated(model: nn.Module, blocks: Sequence[str], plain: Collection[str]) -> list[str]:
    """The layers that can be skipped, if what they output is known.

    Of every list of layers the first of each kind must run, because of what later ones may use of
    it (the length of the cache). What has an output besides hidden states must run, too.
    """
    kinds: dict[tuple[str, ...], str] = {}
    layers = _list_layers(blocks, plain)
    for name in layers:
        classes = (type(module).__name__ for module in model.get_submodule(name).modules())
        kinds.setdefault((name.rpartition(".")[0], *classes), name)
    return [name for name in layers if name not in kinds.values()]


def _list_layers(blocks: Sequence[str], plain: Collection[str]) -> list[str]:
    return [name for name in blocks if name.rpartition(".")[2].isdecimal() and name in plain]


@contextmanager
def skip_calls(
    model: nn.Module,
    calls: Collection[BlockCall],
    expected: Mapping[BlockCall, list[torch.Tensor]],
) -> Iterator[None]:
    """In a `with`, these calls output what is expected of them, and compute nothing."""
    modules = {name: model.get_submodule(name) for name in sorted({call.block for call in calls})}

    def make_forward(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        count = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            call, count = BlockCall(name, count), count + 1
            if call not in calls:
                return compute(*args, **kwargs)
            dtype: torch.dtype = next(model.parameters()).dtype
            return expected[call][0].to(dtype)

        return forward

    for name, module in modules.items():
        module.forward = make_forward(name, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward
