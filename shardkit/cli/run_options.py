"""Options of the commands that run a model."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

import click

from shardkit.errors import RanksError
from shardkit.timeouts import Timeouts

TERMINATED = 128 + signal.SIGTERM

DTYPE = click.option(
    "--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Run in this dtype instead of the checkpoint's own.",
)  # fmt: skip
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]),
    help="Run here; by default on the GPUs, if there are any.",
)  # fmt: skip


def read_timeouts(
    _context: click.Context, _option: click.Parameter, given: Sequence[str]
) -> Timeouts:
    """The timeouts of `SECONDS` and `NAME=SECONDS`.  Raises click.BadParameter."""
    found = asdict(Timeouts())
    for text in given:
        name, equals, seconds = text.rpartition("=")
        name = name if equals else "collective"
        if name not in found:
            raise click.BadParameter(f"{name!r} is none of {', '.join(found)}")
        try:
            found[name] = float(seconds)
        except ValueError:
            raise click.BadParameter(f"{seconds!r} is no number of seconds") from None
    try:
        return Timeouts(**found)
    except RanksError as error:
        raise click.BadParameter(str(error)) from None


TIMEOUT = click.option(
    "--timeout", "timeouts", multiple=True, metavar="[NAME=]SECONDS", callback=read_timeouts,
    help="Give a rank up that is not heard of in a collective for so long; by default 30."
    " Also join=60, load=600 and request=600: for ranks to arrive, to load, and to answer.",
)  # fmt: skip


def end_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does: the ranks first, then with exit code 143."""

    def end(_number: int, _frame: object) -> NoReturn:
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, end)


def quiet_transformers() -> None:
    """Keep the libraries' bars and hints off the terminal, unless the user has asked for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of hosts that have no name
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
