"""Around every request: who may ask, an id, a line in the log, and errors as JSON."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardkit.errors import ShardkitError
from shardkit.serve.http_errors import describe_error, find_status, list_headers
from shardkit.serve.service import Service

OPEN = {"/", "/page.js", "/page.css", "/health"}  # they say nothing of requests
WATCHED = OPEN | {"/status", "/metrics"}  # asked for again and again
REQUEST_ID = re.compile(r"[\w.-]{1,64}")
CLIENT_CLOSED = 499  # in the log and the metrics: the client went away before an answer
log = logging.getLogger("shardkit.serve")


@dataclass
class RequestRecord:
    """What the log says of a request; endpoints add to `facts`."""

    request_id: str
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class RequestGuard:
    """An ASGI application around another one.

    Args:
        app: What answers; it has the service in its scope, and raises what goes wrong.
        service: Whom it answers, and what counts the answers.
        paths: The paths there are; others are counted as one.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths
        self._options, self._metrics = service.options, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        record = RequestRecord(choose_id(headers.get("x-request-id", "")))
        # Starlette's router raises errors, and does not answer them, if there is an "app".
        scope.update(record=record, service=self._service, app=self)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                add_headers(message, record.request_id)
            await send(message)

        self._metrics.in_flight += 1
        try:
            self._check(headers, scope["path"])
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            record.status = CLIENT_CLOSED
        except Exception as error:  # a fault of ours is an answer, too, and a line in the log
            await self._answer_error(error, record, scope, receive, send_with_id)
        finally:
            self._metrics.in_flight -= 1
            self._finish(record, scope, time.monotonic() - started)

    def _check(self, headers: Headers, path: str) -> None:
        """Raise HTTPException for a host or a key that is not allowed."""
        options = self._options
        if options.hosts and split_host(headers.get("host", "")) not in options.hosts:
            raise HTTPException(403, "the host header names another host than this one")
        if options.api_key is None or path in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(key.strip().encode(), options.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            text = "the API key is wrong or missing: send it as a bearer token"
            raise HTTPException(401, text, {"www-authenticate": "Bearer"})

    async def _answer_error(
        self, error: Exception, record: RequestRecord, scope: Scope, receive: Receive, send: Send
    ) -> None:
        record.facts["error"] = getattr(error, "detail", str(error))
        if not isinstance(error, ShardkitError | HTTPException):
            log.exception("request %s failed", record.request_id)
        if record.status:  # the answer has begun; it ends here, and not as if it were whole
            raise error
        answer = JSONResponse(describe_error(error), find_status(error), list_headers(error))
        await answer(scope, receive, send)

    def _finish(self, record: RequestRecord, scope: Scope, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = record.status or CLIENT_CLOSED
        self._metrics.requests[path, status] += 1
        self._metrics.seconds.add(seconds)
        client = scope.get("client") or ("", 0)
        line = {
            "request_id": record.request_id, "method": scope["method"],
            "path": scope["path"], "status": status, "seconds": round(seconds, 4),
            "client": client[0], **record.facts,
        }  # fmt: skip
        level = logging.DEBUG if status == 200 and scope["path"] in WATCHED else logging.INFO
        log.log(level, "request", extra={"facts": line})


def choose_id(given: str) -> str:
    """A client's own request id, if it is a plain word; else a new one."""
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def split_host(host: str) -> str:
    """A host header without its port, and an IPv6 address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def add_headers(message: MutableMapping[str, Any], request_id: str) -> None:
    """Add what every answer has: the request's id, and that nobody guesses its type."""
    message["headers"] = [
        *message.get("headers", []),
        (b"x-request-id", request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
    ]
