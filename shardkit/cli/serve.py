"""`shardkit serve`: an HTTP server of a shard folder."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from shardkit.cli.options import (
    DEVICE,
    DTYPE,
    FOLDER,
    REDUCE_DTYPE,
    TIMEOUT,
    end_on_sigterm,
    quiet_transformers,
)
from shardkit.cli.output import print_line
from shardkit.errors import UsageError

LOADING = ("device", "timeouts", "verify", "dequantize")  # options that launch has, too
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@click.command()
@click.argument("shards", type=FOLDER)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
    help="Port to listen on; 0 is any that is free.",
)  # fmt: skip
@click.option(
    "--api-key", envvar="SHARDKIT_API_KEY", show_envvar=True, metavar="KEY",
    help="What clients must send as a bearer token; needed if other hosts can reach the server.",
)  # fmt: skip
@click.option(
    "--name", metavar="NAME", help="The model's name for clients (default: the folder's)."
)
@click.option(
    "--max-batch-size", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
    help="Sequences that are generated together.",
)  # fmt: skip
@click.option(
    "--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, metavar="N",
    help="Sequences that wait; a request beyond is refused.",
)  # fmt: skip
@click.option(
    "--max-seconds", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True,
    metavar="SECONDS", help="Time that a request may take, waiting included.",
)  # fmt: skip
@click.option(
    "--pooling", type=click.Choice(["mean", "cls", "last"]), default="mean", show_default=True,
    help="How an encoder's token vectors become one: their mean, the first, or the last.",
)  # fmt: skip
@click.option("--verify", is_flag=True, help="Check each shard's SHA-256 while loading it.")
@click.option(
    "--dequantize", type=click.Choice(["forward", "load"]), default="forward", show_default=True,
    help="When quantized weights are computed: as layers run, or once at load.",
)  # fmt: skip
@DTYPE
@REDUCE_DTYPE
@DEVICE
@TIMEOUT
def serve(
    shards: Path, host: str, port: int, api_key: str | None, name: str | None, **settings: Any
) -> None:
    """Answer HTTP requests as OpenAI's API has them.

    SHARDS is a shard folder; one process per rank is started on this machine. A first SIGTERM or
    Ctrl-C lets requests finish, a second one does not.

    \b
    Example:
      shardkit serve llama-tp4 --port 8000
    """
    check_server(host, api_key)
    quiet_transformers()
    end_on_sigterm()
    import torch

    from shardkit import runtime
    from shardkit.serve import ServeOptions, run_server
    from shardkit.serve.json_log import configure_log
    from shardkit.serve.run_server import bind_socket

    configure_log(sys.stderr)
    limits = runtime.Limits(
        max_batch_size=settings["max_batch_size"], max_queue=settings["max_queue"]
    )
    loading: dict[str, Any] = {key: settings[key] for key in LOADING}
    dtypes = {key: settings[key] for key in ("dtype", "reduce_dtype")}
    loading |= {key: getattr(torch, name) if name else None for key, name in dtypes.items()}
    loading["limits"] = limits
    options = ServeOptions(
        model=name or shards.resolve().name, api_key=api_key, pooling=settings["pooling"],
        hosts=LOOPBACK if host in LOOPBACK else frozenset(),
        request_timeout=settings["max_seconds"],
    )  # fmt: skip
    if is_follower():
        runtime.launch(shards, **loading)  # until rank 0 closes, which ends the program
    sock = bind_socket(host, port)
    with sock, runtime.launch(shards, **loading) as engine:
        sock.listen()  # who reads the next line may connect
        address = f"[{host}]" if ":" in host else host
        print_line(f"{options.model} answers at http://{address}:{sock.getsockname()[1]}")
        code = run_server(engine, options, sock)
    sys.exit(code)


def is_follower() -> bool:
    """Whether torchrun started this as another rank than 0, which alone has the address."""
    return "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


def check_server(host: str, api_key: str | None) -> None:
    """Raise UsageError if a library is missing, or if anybody on a network could ask."""
    for module in ("starlette", "uvicorn"):
        if find_spec(module) is None:
            raise UsageError(f"{module} is not installed: pip install 'shardkit[serve]'")
    if host not in LOOPBACK and not api_key:
        raise UsageError(f"--host {host}: other hosts can reach it; give an --api-key as well")
