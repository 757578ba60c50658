"""Options of the commands that run a model."""

import logging
import os

import click

DTYPE = click.option(
    "--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Run in this dtype instead of the checkpoint's own.",
)  # fmt: skip
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]),
    help="Run here; by default on the GPUs, if there are any.",
)  # fmt: skip


def quiet_transformers() -> None:
    """Keep the libraries' bars and hints off the terminal, unless the user has asked for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
