"""Runs a server until a signal ends it: the first lets requests finish, the second does not."""

import asyncio
import logging
import socket
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from shardkit.errors import RanksError, UsageError, first_line
from shardkit.runtime import Engine
from shardkit.serve.app import make_app
from shardkit.serve.serve_options import ServeOptions

KEEP_ALIVE = 5  # seconds that an idle connection is kept
WATCH = 1.0  # seconds between two looks at whether the ranks are alive
ATTEMPTS = 5  # to bring ranks back, one after another
log = logging.getLogger("shardkit.serve")


class SignalServer(uvicorn.Server):
    """uvicorn's server, which drains the engine at a first signal and ends it at a second."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self.signal: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        if self.should_exit:
            self.force_exit = True
            threading.Thread(target=self._engine.close, daemon=True).start()
            return
        self.signal, self.should_exit = sig, True
        threading.Thread(target=self._engine.drain, daemon=True).start()


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any. Raises UsageError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol given, asyncio sends each piece at once (TCP_NODELAY): without it the second
    # piece of an answer waits for the client to acknowledge the first, which takes 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UsageError(f"{host} port {port}: {error.strerror or error}") from None
    return sock


def run_server(engine: Engine, options: ServeOptions, sock: socket.socket) -> int:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        engine: What runs the model; the caller closes it.
        options: How to answer.
        sock: Where, as `bind_socket` makes it; it is closed at the end.

    Returns:
        The exit code of a program that this signal ends.

    Raises:
        RanksError: The ranks are lost, and do not start again.
    """
    server = SignalServer(make_config(make_app(engine, options)), engine)
    asyncio.run(_serve(server, engine, sock))
    if server.signal is None:
        raise RanksError(engine.status().failure or "the server ended by itself")
    return 128 + server.signal


def make_config(app: ASGIApp) -> uvicorn.Config:
    """uvicorn's part: HTTP alone, no log of its own, one process."""
    return uvicorn.Config(
        app, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE,
    )  # fmt: skip


async def _serve(server: SignalServer, engine: Engine, sock: socket.socket) -> None:
    watcher = asyncio.ensure_future(_revive_ranks(server, engine))
    try:
        await server.serve(sockets=[sock])
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _revive_ranks(server: SignalServer, engine: Engine) -> None:
    """Restart ranks that are lost; end the server if they do not start."""
    failures = 0
    while failures < ATTEMPTS:
        await asyncio.sleep(WATCH * 2**failures)
        if engine.alive or server.should_exit:
            continue
        log.error("the ranks are lost, and are started again: %s", engine.status().failure)
        try:
            await asyncio.to_thread(engine.restart)
            failures = 0
        except (RanksError, OSError, RuntimeError) as error:  # ports or processes can run out
            log.error("the ranks do not start: %s", first_line(error))
            failures += 1
    server.should_exit = True
