"""What a caller has of a request: its pieces as they come, its result, and a way to cancel it.

A handle may be used from any thread and any event loop, and by several at once: its pieces are
kept until it is dropped, and each iterator reads them from the first.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from shardkit.errors import RequestCancelled, RequestTimeout

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token, before any sampling parameter is applied.

    Attributes:
        token: Its id.
        logprob: A natural logarithm.
        top: The most probable ids and their log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step adds to one sequence of a request.

    Attributes:
        index: Which sequence, from 0 to n - 1.
        ids: The new token ids.
        text: The text that they complete; "" without a tokenizer, or while none is complete.
        logprobs: Of each new token, if asked for.
        finish_reason: "stop" or "length" with the last chunk of a sequence, else None.
        stop_reason: The text or token id of the request that ended it, if one did.
    """

    index: int
    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole sequence: its chunks, concatenated. The ids include that of an end token."""

    index: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What a request has generated: the prompt's token ids, and n completions, by index."""

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.completions[0].text

    @property
    def ids(self) -> tuple[int, ...]:
        """The new token ids of the first completion."""
        return self.completions[0].ids


class Handle:
    """A request. Iterate over it, with `for` or `async for`; or call `result`, or `await` it.

    Attributes:
        prompt_ids: The prompt's token ids.
        deadline: When it fails unless it has finished, on time.monotonic's clock; None if never.
    """

    def __init__(self, prompt_ids: tuple[int, ...], n: int, timeout: float | None) -> None:
        self.prompt_ids = prompt_ids
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._n = n
        self._chunks: list[Chunk] = []
        self._num_open = n
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether it has finished, failed or been cancelled."""
        return self._num_open == 0 or self._error is not None

    def cancel(self) -> None:
        """End it, unless it is done: its sequences leave the batch before the next step."""
        self.fail(RequestCancelled("the request was cancelled"))

    def result(self, timeout: float | None = None) -> RequestResult:
        """Wait for all of it.

        Args:
            timeout: Seconds to wait; then RequestTimeout is raised, and the request goes on.

        Raises:
            RequestTimeout: It did not finish in time.
            RequestCancelled: It was cancelled.
            RanksLost: A rank died or fell silent; the message names it.
            RanksError: The model refuses it.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise RequestTimeout(f"the request has not finished in {timeout:g} s")
        return self._collect()

    def __iter__(self) -> Iterator[Chunk]:
        """Every chunk, as it comes. An iterator that is closed before the last cancels it.

        Raises as `result` does, once it has yielded what came before.
        """
        at = 0
        try:
            while True:
                chunks, done = self._wait_for_chunks(at)
                at += len(chunks)
                yield from chunks
                if done:
                    break
        finally:
            self.cancel()
        self._check()

    def _wait_for_chunks(self, at: int) -> tuple[list[Chunk], bool]:
        """The chunks from number `at`, at least one unless it is done; and whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or at < len(self._chunks))
            return self._chunks[at:], self.done

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Every chunk, as it comes. An iterator that is closed before the last cancels it."""
        at = 0
        try:
            while True:
                done = self.done
                chunks = self._chunks[at:]
                at += len(chunks)
                for chunk in chunks:
                    yield chunk
                if done:
                    break
                await self._wait_for_change(at)
        finally:
            self.cancel()
        self._check()

    def __await__(self) -> Generator[Any, None, RequestResult]:
        return self._wait_for_result().__await__()

    async def _wait_for_result(self) -> RequestResult:
        try:
            while not self.done:
                await self._wait_for_change(len(self._chunks))
        finally:
            self.cancel()
        return self._collect()

    async def _wait_for_change(self, at: int) -> None:
        """Wait until there is a chunk number `at`, or it is done."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            loop.call_soon_threadsafe(event.set)

        with self._changed:
            if self.done or at < len(self._chunks):
                return
            self._listeners.append(notify)
        try:
            await event.wait()
        finally:
            with self._changed:
                if notify in self._listeners:
                    self._listeners.remove(notify)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk; for the engine. Nothing is added once it is done."""
        with self._changed:
            if self.done:
                return
            self._chunks.append(chunk)
            self._num_open -= chunk.finish_reason is not None
            self._notify()

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it is done; for the engine."""
        with self._changed:
            if not self.done:
                self._error = error
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        listeners, self._listeners = self._listeners, []
        for notify in listeners:
            try:
                notify()
            except RuntimeError:  # its event loop has been closed, and nobody waits
                continue

    def _check(self) -> None:
        if self._error is not None:
            raise copy_error(self._error)

    def _collect(self) -> RequestResult:
        self._check()
        return RequestResult(
            self.prompt_ids, tuple(collect_chunks(i, self._chunks) for i in range(self._n))
        )


def copy_error(error: BaseException) -> BaseException:
    """An error of the same kind and words, to raise in another thread or again."""
    return type(error)(*error.args)


def collect_chunks(index: int, chunks: list[Chunk]) -> Completion:
    """The completion of a sequence, of which every chunk has come."""
    own = [chunk for chunk in chunks if chunk.index == index]
    assert own[-1].finish_reason is not None
    return Completion(
        index,
        tuple(token for chunk in own for token in chunk.ids),
        "".join(chunk.text for chunk in own),
        tuple(logprob for chunk in own for logprob in chunk.logprobs),
        own[-1].finish_reason,
        own[-1].stop_reason,
    )
