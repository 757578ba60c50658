"""What is said of blocks that are too far off, and of which their outputs may differ in part."""

from collections.abc import Collection, Mapping

from shardkit.dtypes import torch_name
from shardkit.layout.style import PADDED
from shardkit.planning import Placement
from shardkit.verification.block_record import BlockComparison


def list_counterparts(module: str, block: str, names: Collection[str]) -> list[str]:
    """The same module in the layers before a block, by their numbers.

    Example:
        >>> list_counterparts("layers.2.mlp", "layers.2", {"layers.0.mlp", "layers.1.attn"})
        ['layers.0.mlp']
    """
    layers, _, number = block.rpartition(".")
    if not number.isdecimal():
        return []
    rest = module.removeprefix(block)
    return [name for n in range(int(number)) if (name := f"{layers}.{n}{rest}") in names]


def list_padded(placements: Mapping[str, Placement]) -> frozenset[str]:
    """The modules whose outputs have zeros where other ranks' features are."""
    names = (name for name, p in placements.items() if p.style is PADDED)
    return frozenset(name.removesuffix(".weight") for name in names)


def describe_block_fault(fault: BlockComparison) -> str:
    """How far a block is off, in one line."""
    result = fault.result
    return (
        f"{fault.call}, on rank {fault.tp_rank} in {torch_name(fault.dtype)}: error"
        f" {result.sharded.max:.3g} (rms {result.sharded.rms:.3g}), but the unsharded block's"
        f" rounding allows {result.allowed.max:.3g} (rms {result.allowed.rms:.3g})"
    )
