"""The ASGI application of a server: its routes, and the guard around them."""

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from shardkit.runtime import Engine
from shardkit.serve.completions import answer_chat, answer_completion
from shardkit.serve.embeddings import answer_embeddings
from shardkit.serve.request_guard import RequestGuard
from shardkit.serve.serve_options import ServeOptions
from shardkit.serve.service import Service
from shardkit.serve.status_pages import (
    answer_health,
    answer_metrics,
    answer_models,
    answer_page,
    answer_status,
)

ROUTES = [
    Route("/v1/completions", answer_completion, methods=["POST"]),
    Route("/v1/chat/completions", answer_chat, methods=["POST"]),
    Route("/v1/embeddings", answer_embeddings, methods=["POST"]),
    Route("/v1/models", answer_models),
    Route("/health", answer_health),
    Route("/metrics", answer_metrics),
    Route("/status", answer_status),
    *(Route(path, answer_page) for path in ("/", "/page.js", "/page.css")),
]


def make_app(engine: Engine, options: ServeOptions) -> ASGIApp:
    """The application that answers with an engine, for any ASGI server.

    Args:
        engine: What runs the model; the caller closes it.
        options: How it answers.
    """
    paths = frozenset(route.path for route in ROUTES)
    return RequestGuard(Router(ROUTES), Service(engine, options), paths)
