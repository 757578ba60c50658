"""Which blocks the ranks run, if not all: drawn from a seed, and what must run in any case."""

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
    """The blocks that ranks need not run.

    Of every list of layers the first of each kind runs, because of what later ones may use of it
    (the length of the cache), and the last. What has an output besides hidden states runs, too.

    Args:
        model: The model.
        blocks: Its blocks, in the order it has them.
        plain: Those of them that output one tensor.
        options: How many to run, and what to draw them from.
    """
    if options.sample is None:
        return frozenset()
    layers = [name for name in blocks if name.rpartition(".")[2].isdecimal() and name in plain]
    kinds: dict[tuple[str, ...], str] = {}
    last: dict[str, str] = {}
    for name in layers:
        parent = name.rpartition(".")[0]
        classes = (type(module).__name__ for module in model.get_submodule(name).modules())
        kinds.setdefault((parent, *classes), name)
        last[parent] = name
    others = [name for name in layers if name not in {*kinds.values(), *last.values()}]
    drawn = random.Random(options.seed).sample(others, min(options.sample, len(others)))
    return frozenset(others) - frozenset(drawn)


@contextmanager
def skip_blocks(
    model: nn.Module, blocks: Collection[str], expected: Mapping[BlockCall, list[torch.Tensor]]
) -> Iterator[None]:
    """In a `with`, these blocks output what is expected of them, and compute nothing."""
    modules = [model.get_submodule(name) for name in blocks]

    def make_forward(name: str) -> Callable[..., torch.Tensor]:
        calls = 0

        def forward(*_args: Any, **_kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            dtype: torch.dtype = next(model.parameters()).dtype
            return expected[BlockCall(name, calls - 1)][0].to(dtype)

        return forward

    for name, module in zip(blocks, modules, strict=True):
        module.forward = make_forward(name)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
