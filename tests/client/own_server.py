"""A server of one's own: POST a prompt as text, and the answer comes as it is generated.

Its arguments: a shard folder, and a port.
"""

import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import shardkit
from shardkit.errors import EngineBusy, RanksLost, RequestError, RequestTimeout

engine = shardkit.launch(sys.argv[1])
STATUSES = {RequestError: 400, EngineBusy: 429, RanksLost: 503, RequestTimeout: 504}


async def answer_prompt(request: Request) -> Response:
    prompt = (await request.body()).decode()
    handle = engine.submit(prompt, max_tokens=64, temperature=0, timeout=60)

    async def list_pieces() -> AsyncIterator[str]:
        async for chunk in handle:  # a client that goes away ends this, and its request
            yield chunk.text

    return StreamingResponse(list_pieces(), media_type="text/plain")


async def answer_error(_request: Request, error: Exception) -> Response:
    status = next(code for kind, code in STATUSES.items() if isinstance(error, kind))
    return PlainTextResponse(f"{error}\n", status)


app = Starlette(
    routes=[Route("/", answer_prompt, methods=["POST"])],
    exception_handlers=dict.fromkeys(STATUSES, answer_error),
)
if __name__ == "__main__":
    with engine:
        uvicorn.run(app, port=int(sys.argv[2]) if sys.argv[2:] else 8000, log_level="warning")
