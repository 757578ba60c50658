"""Errors as HTTP has them: a status, and OpenAI's error object."""

from typing import Any

from starlette.exceptions import HTTPException

from shardkit.errors import (
    EngineBusy,
    EngineDraining,
    ManifestError,
    RanksError,
    RanksLost,
    RequestCancelled,
    RequestTimeout,
    ShardkitError,
    UsageError,
)

# The first row that fits: a kind of error, its status, and what OpenAI calls it.
ROWS: tuple[tuple[type[ShardkitError], int, str], ...] = (
    (EngineDraining, 503, "unavailable_error"),
    (EngineBusy, 429, "rate_limit_error"),
    (RequestTimeout, 504, "timeout_error"),
    (RequestCancelled, 503, "unavailable_error"),
    (RanksLost, 503, "unavailable_error"),
    (RanksError, 500, "server_error"),
    (UsageError, 400, "invalid_request_error"),
    (ManifestError, 400, "invalid_request_error"),  # a text, and no tokenizer
)
KINDS = {401: "authentication_error", 404: "not_found_error"}  # of refusals by HTTP's own rules


def find_status(error: BaseException) -> int:
    """The HTTP status of an error; 500 for one that nobody has foreseen."""
    if isinstance(error, HTTPException):
        return error.status_code
    return next((status for kind, status, _ in ROWS if isinstance(error, kind)), 500)


def list_headers(error: BaseException) -> dict[str, str]:
    """The headers that an error's answer has."""
    if isinstance(error, EngineBusy):
        return {"retry-after": "1"}
    return dict(error.headers or {}) if isinstance(error, HTTPException) else {}


def describe_error(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object; what nobody has foreseen is not shown to clients."""
    status = find_status(error)
    if isinstance(error, ShardkitError):
        kind = next((kind for row, _, kind in ROWS if isinstance(error, row)), "server_error")
        message = str(error)
    elif isinstance(error, HTTPException):
        kind, message = KINDS.get(status, "invalid_request_error"), error.detail
    else:
        kind, message = "server_error", "an error of the server; its log says more"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
