"""Options that several commands share, the progress bar, and how a command ends on SIGTERM."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import click

from shardkit.errors import RanksError, UsageError
from shardkit.files import ProgressCallback
from shardkit.output.available_memory import parse_size
from shardkit.timeouts import Timeouts

TERMINATED = 128 + signal.SIGTERM

FOLDER = click.Path(path_type=Path)
TP = click.option(
    "--tp",
    "tp_size",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Number of tensor-parallel ranks.",
)
RECIPE = click.option(
    "--recipe",
    metavar="NAME|FILE.toml",
    help="Recipe to use instead of the one for the config's model_type.",
)
REVISION = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a Hub repository."
)
EXPERT_PARALLEL = click.option(
    "--expert-parallel",
    is_flag=True,
    help="Place whole experts on each rank, instead of a part of every expert.",
)
FORCE = click.option(
    "--force",
    is_flag=True,
    help="Replace an existing output in one step, if shardkit wrote it.",
)
RESUME = click.option(
    "--resume",
    is_flag=True,
    help="Resume an interrupted run; keep the partial output if interrupted again.",
)
ALLOW_PICKLE = click.option(
    "--allow-pickle",
    is_flag=True,
    help="If there are only pickled .bin weights, convert them to safetensors in a sandboxed"
    " subprocess first; needs their size free in TMPDIR.",
)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Run in this dtype instead of the checkpoint's own.",
)
REDUCE_DTYPE = click.option(
    "--reduce-dtype",
    type=click.Choice(["bfloat16"]),
    help="Send summands of wider activations in this dtype, rounded to it (default: in their own).",
)
DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device to run on (default: cuda if available, else cpu).",
)


def read_timeouts(
    _context: click.Context, _option: click.Parameter, values: Sequence[str]
) -> Timeouts:
    """The timeouts of `SECONDS` and `NAME=SECONDS`. Raises click.BadParameter."""
    seconds_by_name = asdict(Timeouts())
    for text in values:
        name, equals, seconds = text.rpartition("=")
        name = name if equals else "collective"
        if name not in seconds_by_name:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(seconds_by_name)}")
        try:
            seconds_by_name[name] = float(seconds)
        except ValueError:
            raise click.BadParameter(f"{seconds!r} is not a number of seconds") from None
    try:
        return Timeouts(**seconds_by_name)
    except RanksError as error:
        raise click.BadParameter(str(error)) from None


TIMEOUT = click.option(
    "--timeout",
    "timeouts",
    multiple=True,
    metavar="[NAME=]SECONDS",
    callback=read_timeouts,
    help="Seconds without a heartbeat before a rank is considered lost (default 30)."
    " Or NAME=SECONDS: join=60, load=600, request=600.",
)


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback | None]:
    """A bar of bytes on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm  # costs more than many a plan, and nobody would see it

    with tqdm(desc=title, unit="B", unit_scale=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextmanager
def block_bar() -> Iterator[ProgressCallback | None]:
    """A bar of blocks on stderr, with the time they still take, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="numerics", unit="block", leave=False, delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def read_size(_ctx: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """Bytes of a size such as 80G. Raises click.BadParameter."""
    try:
        return None if value is None else parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


MAX_MEMORY = click.option(
    "--max-memory",
    metavar="SIZE",
    callback=read_size,
    help="Memory that may be taken, such as 80G (default: what is free, less a tenth).",
)


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done and for how long, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as line:
        yield line.set_description_str


def end_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does: the ranks first, then with exit code 143."""

    def end(_number: int, _frame: object) -> NoReturn:
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, end)


def quiet_transformers() -> None:
    """Keep the libraries' bars and hints off the terminal, unless the user asks for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of hosts that have no name
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
