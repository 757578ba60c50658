"""What every endpoint has: the engine, the options, and the counts; and how prompts reach it."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardkit.errors import ManifestError
from shardkit.runtime import Chunk, Engine, Handle, SamplingParams
from shardkit.serve.metrics import Metrics
from shardkit.serve.serve_options import ServeOptions


@dataclass(frozen=True)
class Service:
    """A server's engine, how it answers, and what it has answered."""

    engine: Engine
    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    started: float = field(default_factory=time.time)

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """The folder's tokenizer; None if it has none."""
        try:
            return self.engine.tokenizer
        except ManifestError:
            return None

    def decode_token(self, token: int) -> str:
        """The text of one token; its number if there is no tokenizer."""
        return str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))

    async def submit_all(self, prompts: Sequence[Any], params: SamplingParams) -> list[Handle]:
        """Submit prompts, all or none, in a thread: to encode a long text takes a while."""
        handles: list[Handle] = []
        try:
            for prompt in prompts:
                handles.append(await self._submit(prompt, params))
        except BaseException:
            cancel_all(handles)
            raise
        return handles

    async def _submit(self, prompt: Any, params: SamplingParams) -> Handle:
        submit = functools.partial(
            self.engine.submit, prompt, params, timeout=self.options.request_timeout
        )
        task = asyncio.ensure_future(asyncio.to_thread(submit))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # the client has gone, and the thread goes on
            task.add_done_callback(_cancel_result)
            raise

    def count_tokens(self, prompt_tokens: int, new_tokens: int) -> dict[str, int]:
        """Count the tokens of an answer in; for the log, too."""
        self.metrics.prompt_tokens += prompt_tokens
        self.metrics.new_tokens += new_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens}


def _cancel_result(task: "asyncio.Future[Handle]") -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().cancel()


def cancel_all(handles: Sequence[Handle]) -> None:
    """Cancel those that are not done."""
    for handle in handles:
        handle.cancel()


async def merge_chunks(handles: Sequence[Handle]) -> AsyncIterator[tuple[int, Chunk]]:
    """The chunks of several requests as they come, each with its request's number.

    Raises what the first to fail raises. Once it ends, none goes on.
    """
    queue: asyncio.Queue[tuple[int, Chunk | None]] = asyncio.Queue()

    async def read(at: int, handle: Handle) -> None:
        try:
            async for chunk in handle:
                queue.put_nowait((at, chunk))
        finally:
            queue.put_nowait((at, None))

    tasks = [asyncio.ensure_future(read(at, handle)) for at, handle in enumerate(handles)]
    try:
        for _ in tasks:
            while True:
                at, chunk = await queue.get()
                if chunk is None:
                    await tasks[at]  # raises what its request has
                    break
                yield at, chunk
    finally:
        cancel_all(handles)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
