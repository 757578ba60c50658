"""Reads a request's body: so many bytes, in so much time, and JSON that is an object."""

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from shardkit.strict_json import JsonError, parse_json

BODY_SECONDS = 60.0  # for a body to arrive
MAX_VALUES = 2_000_000  # JSON values of a body


async def read_body(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises HTTPException (408, 413 or 415), and JsonError.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web page of another site can send unasked
        raise HTTPException(415, f"content-type is {kind or 'missing'}; send application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    raise HTTPException(413, f"the body is longer than {max_bytes} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive in {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    try:
        value = parse_json(bytes(data), MAX_VALUES)
    except JsonError as error:
        raise HTTPException(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "the body is no JSON object")
    return value
