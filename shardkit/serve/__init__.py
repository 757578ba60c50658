"""An HTTP server of one engine, with the endpoints of OpenAI's API; needs `shardkit[serve]`."""

from shardkit.serve.app import make_app
from shardkit.serve.run_server import run_server
from shardkit.serve.serve_options import ServeOptions

__all__ = ["ServeOptions", "make_app", "run_server"]
