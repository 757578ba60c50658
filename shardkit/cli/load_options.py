"""Options of commands that load shards to run them."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from shardkit.cli.options import DTYPE, REDUCE_DTYPE

VERIFY = click.option("--verify", is_flag=True, help="Check each shard's SHA-256 while loading it.")
DEQUANTIZE = click.option(
    "--dequantize",
    type=click.Choice(["forward", "load"]),
    default="forward",
    show_default=True,
    help="Compute quantized weights as layers run, in the memory of the shard; or once at load, for"
    " speed, in that of 16-bit weights.",
)
MMAP = click.option(
    "--mmap",
    is_flag=True,
    help="Map weights instead of reading them: a start at once, if nothing changes the files.",
)
COMPILE = click.option(
    "--compile",
    is_flag=True,
    help="Compile decoding by torch.compile, over a cache of fixed size: faster steps after a first"
    " request that takes minutes.",
)
LOAD_OPTIONS = {
    "verify": VERIFY, "dequantize": DEQUANTIZE, "mmap": MMAP, "compile": COMPILE, "dtype": DTYPE,
    "reduce_dtype": REDUCE_DTYPE,
}  # fmt: skip


def add_load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options, in their order."""
    for option in reversed(LOAD_OPTIONS.values()):
        command = option(command)
    return command


def read_load_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's settings, those of `runtime.launch` that these options are."""
    import torch  # takes a second

    options = {name: settings[name] for name in LOAD_OPTIONS}
    dtypes = {name: options[name] for name in ("dtype", "reduce_dtype")}
    return options | {key: getattr(torch, name) if name else None for key, name in dtypes.items()}
