"""A server of an engine on a port of the loopback, in a thread of the test's process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from shardkit.runtime import Engine
from shardkit.serve import ServeOptions, make_app
from shardkit.serve.run_server import bind_socket, make_config

SECONDS = 30.0  # for a server to start or to end


@contextmanager
def serve_engine(engine: Engine, options: ServeOptions) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    server = uvicorn.Server(make_config(make_app(engine, options)))
    with bind_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            end = time.monotonic() + SECONDS
            while not server.started and time.monotonic() < end:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(SECONDS)
