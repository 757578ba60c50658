"""Errors as HTTP has them: a status, and OpenAI's error object."""

from typing import Any

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
KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error"}


class HttpError(Exception):
    """A request that is refused by HTTP's own rules."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def find_status(error: BaseException) -> int:
    """The HTTP status of an error; 500 for one that nobody has foreseen."""
    if isinstance(error, HttpError):
        return error.status
    return next((status for kind, status, _ in ROWS if isinstance(error, kind)), 500)


def describe_error(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object; what nobody has foreseen is not shown to clients."""
    status = find_status(error)
    if isinstance(error, ShardkitError):
        kind = next((kind for row, _, kind in ROWS if isinstance(error, row)), "server_error")
        message = str(error)
    elif isinstance(error, HttpError):
        kind, message = KINDS.get(status, "invalid_request_error"), str(error)
    else:
        kind, message = "server_error", "an error of the server; its log says more"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
