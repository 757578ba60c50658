"""The endpoints that generate: completions and chats, whole or as a stream of events."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from shardkit.errors import ShardkitError
from shardkit.runtime import Handle, RequestResult
from shardkit.serve.disconnects import EventStream, run_while_connected
from shardkit.serve.generation_request import GenerationRequest, read_chat, read_completion
from shardkit.serve.http_errors import describe_error
from shardkit.serve.request_body import read_body
from shardkit.serve.request_guard import RequestRecord
from shardkit.serve.response_bodies import AnswerForm
from shardkit.serve.service import Service, cancel_all, merge_chunks


async def answer_completion(request: Request) -> Response:
    """POST /v1/completions."""
    service: Service = request.scope["service"]
    body = await read_body(request, service.options.max_body_bytes)
    return await _answer(request, read_completion(body, service.options), is_chat=False)


async def answer_chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service: Service = request.scope["service"]
    body = await read_body(request, service.options.max_body_bytes)
    return await _answer(request, read_chat(body, service.options), is_chat=True)


async def _answer(request: Request, asked: GenerationRequest, is_chat: bool) -> Response:
    service: Service = request.scope["service"]
    form = AnswerForm(is_chat, service.options.model, service.decode_token, asked.with_ids)
    record: RequestRecord = request.scope["record"]
    if asked.stream:
        # What cannot be submitted is an answer of its own, and no event.
        handles = await service.submit_all(asked.prompts, asked.params)
        events = stream_events(service, form, asked, handles, record)
        return EventStream(events, lambda: cancel_all(handles))
    results = await run_while_connected(request.receive, _generate(service, asked))
    answer = form.make_answer(results)
    usage = answer["usage"]
    record.facts |= service.count_tokens(usage["prompt_tokens"], usage["completion_tokens"])
    return JSONResponse(answer)


async def _generate(service: Service, asked: GenerationRequest) -> Sequence[RequestResult]:
    handles = await service.submit_all(asked.prompts, asked.params)
    try:
        return await asyncio.gather(*handles)
    finally:
        cancel_all(handles)


async def stream_events(
    service: Service,
    form: AnswerForm,
    asked: GenerationRequest,
    handles: Sequence[Handle],
    record: RequestRecord,
) -> AsyncGenerator[str, None]:
    """The events of a stream; an error once it has begun is an event, and then it ends."""
    began, new_tokens = time.monotonic(), 0
    num_choices = asked.params.n
    if form.is_chat:
        for index in range(num_choices * len(handles)):
            yield make_event(form.make_opening(index))
    try:
        async for at, chunk in merge_chunks(handles):
            if chunk.ids and not new_tokens:
                service.metrics.first_token.add(time.monotonic() - began)
            new_tokens += len(chunk.ids)
            if chunk.text or chunk.finish_reason or chunk.logprobs or asked.with_ids:
                yield make_event(form.make_chunk(at * num_choices + chunk.index, chunk))
    except ShardkitError as error:
        record.facts["error"] = str(error)
        yield make_event(describe_error(error))
        return
    finally:
        prompt_tokens = sum(len(handle.prompt_ids) for handle in handles)
        record.facts |= service.count_tokens(prompt_tokens, new_tokens)
    if asked.with_usage:
        yield make_event(form.make_usage(prompt_tokens, new_tokens))
    yield "data: [DONE]\n\n"


def make_event(value: dict[str, Any]) -> str:
    """A server-sent event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
