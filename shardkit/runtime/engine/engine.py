"""A running model as one object: requests in, tokens out; from any thread or event loop."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardkit.errors import EngineDraining, RanksLost, RequestError
from shardkit.runtime.batching.abilities import Abilities
from shardkit.runtime.engine.call_arguments import check_arguments, is_token_ids
from shardkit.runtime.engine.controller import EngineRanks
from shardkit.runtime.engine.generate_calls import (
    begin_generate,
    begin_stream,
    list_pieces,
    read_output,
    read_tokens,
)
from shardkit.runtime.engine.handle import Handle
from shardkit.runtime.engine.messages import Message, call_request
from shardkit.runtime.engine.prompts import (
    Prompt,
    encode_text,
    has_tokenizer,
    is_text,
    load_tokenizer,
    read_ids,
)
from shardkit.runtime.engine.request_loop import Call
from shardkit.runtime.engine.running_model import RunningModel
from shardkit.runtime.engine.sampling_params import SamplingParams, make_params
from shardkit.runtime.engine.scheduler import Limits
from shardkit.runtime.engine.status import EngineStatus

POLL = 0.02  # seconds between two looks at whether the engine has drained


class Engine:
    """A running model, made by `launch`. Close it, or use it in a `with`.

    Any thread and any event loop may use it. Where sequences can join a running batch
    (`status().obstacle` is ""), a request begins as soon as there is room; elsewhere those with
    prompts of one length are generated together. `forward`, and a `generate` with options that a
    row of a batch cannot have, run between two steps.

    Every method raises RequestError for what no engine would run, EngineBusy if the queue is full,
    and RanksLost once a rank has died or fallen silent; `restart` then brings the ranks back.

    Attributes:
        folder: The shard folder.
    """

    def __init__(
        self,
        folder: Path,
        start_ranks: Callable[[], EngineRanks],
        load: Message,
        limits: Limits | None = None,
    ) -> None:
        """Start ranks, which the engine then owns, and have them `load` a folder."""
        self.folder = folder.resolve()
        self._pid, self._turn = os.getpid(), threading.RLock()
        self._encoding = threading.Lock()  # a tokenizer is changed as it encodes
        self._is_draining = self._is_closed = False
        self._model = RunningModel(start_ranks, load, limits or Limits())

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ranks(self) -> EngineRanks:
        """What runs the model."""
        return self._model.ranks

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self._model.dtype

    @property
    def abilities(self) -> Abilities:
        """What the model can do."""
        return self._model.abilities

    @property
    def alive(self) -> bool:
        """Whether it can work: no rank is known to be lost, and it is not closed."""
        return self._model.loop.failure is None

    def status(self) -> EngineStatus:
        """What it is doing, and what it can do."""
        return self._model.read_status(self._is_draining)

    def close(self) -> None:
        """Stop the ranks; what runs or waits fails with RanksLost."""
        if self._pid != os.getpid():  # a fork of the process that they belong to
            return
        with self._turn:
            self._is_closed = True
            self._model.stop(RanksLost("the engine was closed"))

    def restart(self) -> None:
        """Stop the ranks, however they are, start new ones, and load the model again.

        What runs or waits fails with RanksLost. Raises RanksError if the ranks do not start, or
        if torchrun started them, which alone can start others.
        """
        with self._turn:
            if self._is_closed:
                raise RanksLost("the engine was closed; launch it again")
            self._model = self._model.restart()
            self._is_draining = False

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests with EngineDraining, and wait until the others have finished.

        Args:
            timeout: Seconds to wait; None is as long as it takes.

        Returns:
            Whether all have finished.
        """
        self._is_draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self.alive and not self._model.loop.is_idle():
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(POLL)
        return True

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer. Raises ManifestError if it has none."""
        return load_tokenizer(self.folder)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Handle:
        """Queue a request, and return at once.

        Args:
            prompt: Text, chat messages (mappings of role and content), or token ids.
            params: How to generate.
            timeout: Seconds after which it fails with RequestTimeout, waiting included.
            **sampling: The fields of `SamplingParams`, instead of `params`.

        Returns:
            The request: iterate over it, call `result`, or await it.

        Raises:
            RequestError: A parameter is misspelt or impossible, or the prompt does not fit.
            EngineBusy: The queue is full; EngineDraining, if the engine drains.
            RanksLost: A rank is dead; `restart` the engine.
            ManifestError: The prompt is text, and the folder has no tokenizer.
        """
        self._check_usable()
        if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
            raise RequestError(f"timeout={timeout!r}: it must be above 0 seconds")
        settings = make_params(params, sampling)
        ids = self.input_ids(prompt)
        if len(ids) > 1:
            raise RequestError(f"prompt: {len(ids)} rows of token ids; submit each by itself")
        planner = self._model.planner
        planner.check_prompt(ids)
        handle = Handle(tuple(ids[0].tolist()), settings.n, timeout)
        needs_text = bool(settings.stop or settings.echo) or has_tokenizer(self.folder)
        tokenizer = self.tokenizer if needs_text else None
        self._model.loop.add_sequences(planner.plan_request(handle, settings, tokenizer))
        return handle

    def generate(self, prompt: Prompt | None, seed: int | None = None, **options: Any) -> Any:
        """Generate tokens, as transformers' `generate` does.

        Args:
            prompt: Text, chat messages, token ids, token ids `[B, T]`, or a tokenizer's output;
                None if the options have all that the model reads.
            seed: Makes sampling repeatable.
            **options: Arguments of transformers' `generate`, such as `max_new_tokens`.

        Returns:
            Token ids `[B, T]`, int64; those of the prompt come first for a decoder. With
            `return_dict_in_generate` a dict of what transformers returns, without caches.

        Raises:
            RequestError: An argument cannot be sent to the ranks; the message names it.
            RanksError: The model refuses the arguments, or a rank is lost.
        """
        started = begin_generate(self._model, self._make_arguments(prompt, options), seed)
        if isinstance(started, Handle):
            return read_tokens(started, started.result().ids)
        return read_output(started.future.result())

    async def agenerate(
        self, prompt: Prompt | None, seed: int | None = None, **options: Any
    ) -> Any:
        """As `generate`, without blocking the event loop."""
        started = begin_generate(self._model, self._make_arguments(prompt, options), seed)
        if isinstance(started, Handle):
            return read_tokens(started, (await started).ids)
        return read_output(await asyncio.wrap_future(started.future))

    def stream(self, prompt: Prompt, seed: int | None = None, **options: Any) -> Iterator[Any]:
        """Generate one sequence, and return its tokens as soon as there are any.

        A caller may stop iterating at any time; the sequence then leaves before the next step.

        Args:
            prompt: Text, chat messages or token ids; one sequence.
            seed: Makes sampling repeatable.
            **options: Arguments of transformers' `generate`.

        Yields:
            Pieces of text for text or a chat, token ids (int) for token ids; without the prompt.

        Raises:
            RequestError: An argument cannot be sent to the ranks; the message names it.
            RanksError: The model refuses the arguments, or a rank is lost.
        """
        for chunk in self._begin_stream(prompt, seed, options):
            yield from list_pieces(chunk, is_text(prompt))

    async def astream(
        self, prompt: Prompt, seed: int | None = None, **options: Any
    ) -> AsyncIterator[Any]:
        """As `stream`, for `async for`."""
        async for chunk in self._begin_stream(prompt, seed, options):
            for piece in list_pieces(chunk, is_text(prompt)):
                yield piece

    def forward(self, **inputs: Any) -> Any:
        """Run a forward pass.

        Args:
            **inputs: Arguments of the model's forward, such as `input_ids` `[B, T]` int64.

        Returns:
            What it returns, by name: `logits` `[B, T, V]`, `last_hidden_state`, and so on, without
            caches; a tuple with `return_dict=False`.

        Raises RequestError and RanksError as `generate` does.
        """
        return read_output(self._begin_forward(inputs).future.result())

    async def aforward(self, **inputs: Any) -> Any:
        """As `forward`, without blocking the event loop."""
        return read_output(await asyncio.wrap_future(self._begin_forward(inputs).future))

    def logits(self, prompt: Prompt) -> torch.Tensor:
        """The logits of a prompt, `[B, T, V]`. Raises as `forward` does."""
        logits: torch.Tensor = self.forward(input_ids=self.input_ids(prompt))["logits"]
        return logits

    def input_ids(self, prompt: Prompt) -> torch.Tensor:
        """A prompt as token ids `[B, T]`, int64. Raises ManifestError without a tokenizer."""
        if is_text(prompt):
            with self._encoding:
                return read_ids(encode_text(self.tokenizer, prompt))
        return read_ids(prompt.get("input_ids") if isinstance(prompt, Mapping) else prompt)

    def _begin_stream(self, prompt: Prompt, seed: int | None, options: dict[str, Any]) -> Handle:
        tokenizer = self.tokenizer if is_text(prompt) else None
        arguments = self._make_arguments(prompt, options)
        return begin_stream(self._model, arguments, seed, tokenizer)

    def _begin_forward(self, inputs: dict[str, Any]) -> Call:
        self._check_usable()
        check_arguments(inputs)
        if is_token_ids(ids := inputs.get("input_ids")):
            self._model.planner.check_prompt(ids)
        call = Call(call_request("forward", inputs))
        self._model.loop.add_call(call)
        return call

    def _make_arguments(self, prompt: Prompt | None, options: dict[str, Any]) -> dict[str, Any]:
        """Those of `generate`, which has its own if there is no prompt."""
        self._check_usable()
        if isinstance(prompt, Mapping):
            return {**prompt, "input_ids": read_ids(prompt.get("input_ids")), **options}
        return options if prompt is None else {"input_ids": self.input_ids(prompt), **options}

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise RanksLost("the engine is of the process that forked this one; launch another")
        if self._is_draining:
            raise EngineDraining("the engine takes no more requests: it drains")
