"""The endpoints that tell of the server itself: health, models, status, metrics and the page."""

import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from shardkit.serve.metrics import CONTENT_TYPE
from shardkit.serve.service import Service

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'"
)


async def answer_health(request: Request) -> Response:
    """GET /health: 200 if requests are taken, else 503 and why not."""
    status = request.scope["service"].engine.status()
    if status.alive and not status.draining:
        return JSONResponse({"status": "ok"})
    reason = status.failure or "it drains"
    return JSONResponse({"status": "unavailable", "reason": reason}, 503)


async def answer_models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.scope["service"]
    created = int(service.started)
    entry = {"id": service.options.model, "object": "model", "created": created}
    return JSONResponse({"object": "list", "data": [{**entry, "owned_by": "shardkit"}]})


async def answer_metrics(request: Request) -> Response:
    """GET /metrics."""
    service: Service = request.scope["service"]
    text = service.metrics.render_text(service.engine.status())
    return Response(text, media_type=CONTENT_TYPE)


async def answer_status(request: Request) -> Response:
    """GET /status: what the page shows."""
    service: Service = request.scope["service"]
    return JSONResponse(describe_service(service))


def describe_service(service: Service) -> dict[str, Any]:
    """What a server is doing, as JSON values; memory in bytes."""
    status = service.engine.status()
    return {
        "model": service.options.model,
        "dtype": str(service.engine.dtype).removeprefix("torch."),
        "generates": service.engine.abilities.generates,
        "uptime": time.time() - service.started,
        "alive": status.alive,
        "failure": status.failure,
        "draining": status.draining,
        "ranks": [
            {"rank": rank, "pid": pid, "memory": read_memory(pid)}
            for rank, pid in enumerate(status.rank_pids)
        ],
        "tp_size": status.tp_size,
        "running": status.running,
        "waiting": status.waiting,
        "tokens": status.tokens,
        "steps": status.steps,
        "max_batch_size": status.max_batch_size,
        "max_batch_tokens": status.max_batch_tokens,
        "obstacle": status.obstacle,
    }


def read_memory(pid: int) -> int:
    """The bytes of memory that a process has; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


async def answer_page(request: Request) -> Response:
    """GET / and the page's script and style."""
    name = request.url.path.strip("/") or "page.html"
    text = (files("shardkit.serve") / name).read_text()
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
    return Response(text, media_type=TYPES[name.rpartition(".")[2]], headers=headers)
