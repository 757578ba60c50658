"""From a request's parameters to the sequences that generate it, checked against the model."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from shardkit.errors import RequestError
from shardkit.runtime.batching.abilities import Abilities
from shardkit.runtime.engine.call_arguments import fits_row, list_end_ids
from shardkit.runtime.engine.handle import Chunk, Handle
from shardkit.runtime.engine.sampling_params import SamplingParams
from shardkit.runtime.engine.sequence import GenerationPlan, TextStream, TokenSequence
from shardkit.runtime.engine.text_decoder import TextDecoder

DEFAULT_NEW_TOKENS = 20  # of transformers, for a model whose generation config says nothing


class SequencePlanner:
    """Makes sequences for one model.

    Args:
        abilities: What the model can do.
        max_batch_tokens: Tokens that the KV cache has room for.
        max_queue: Sequences that the queue has room for.
    """

    def __init__(self, abilities: Abilities, max_batch_tokens: int, max_queue: int) -> None:
        self.abilities = abilities
        self.max_batch_tokens, self.max_queue = max_batch_tokens, max_queue
        self._numbers = itertools.count()

    def check_prompt(self, ids: torch.Tensor) -> None:
        """Raise RequestError for token ids `[B, T]` that the model has not, or too many of them."""
        size, positions = self.abilities.vocabulary, self.abilities.positions
        if size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise RequestError(
                f"prompt: token ids {int(ids.min())} to {int(ids.max())}, but the vocabulary has"
                f" {size}"
            )
        if positions is not None and not self.abilities.has_encoder and ids.shape[1] > positions:
            raise RequestError(
                f"prompt: {ids.shape[1]} tokens, but the model has {positions} positions"
            )

    def plan_request(
        self, handle: Handle, params: SamplingParams, tokenizer: Any | None
    ) -> list[TokenSequence]:
        """The sequences of a request, one for each of its n.

        Args:
            handle: Where they go; its prompt has been checked.
            params: How they are generated.
            tokenizer: Decodes them; None for no text.

        Raises:
            RequestError: The model cannot generate that.
        """
        if not self.abilities.generates:
            raise RequestError("the model does not generate; call forward")
        if params.logprobs is not None and self.abilities.obstacle:
            raise RequestError(
                f"logprobs: this model's steps are not the engine's own: {self.abilities.obstacle}"
            )
        if params.n > self.max_queue:
            raise RequestError(f"n={params.n}: the queue has room for {self.max_queue} sequences")
        options: dict[str, Any] = {"do_sample": bool(self.abilities.generation.get("do_sample"))}
        options |= params.to_options()
        end_ids: frozenset[int] = list_end_ids(self.abilities.generation.get("eos_token_id"))
        stop_ids, stop = frozenset(params.stop_token_ids), tuple(params.stop)
        if params.ignore_eos:
            options["eos_token_id"], end_ids = None, frozenset()
        elif self.abilities.obstacle and stop_ids:
            options["eos_token_id"] = sorted(end_ids | stop_ids)
        max_tokens = self._choose_length(len(handle.prompt_ids), params.max_tokens)
        sequences = []
        for index in range(params.n):
            own = options if params.seed is None else {**options, "seed": params.seed + index}
            plan = GenerationPlan(own, max_tokens, end_ids, stop_ids, stop, params.logprobs)
            sequences.append(self._make_sequence(handle, index, plan, tokenizer))
        if params.echo and tokenizer is not None:
            text = tokenizer.decode(handle.prompt_ids, skip_special_tokens=True)
            for index in range(params.n):
                handle.add(Chunk(index, text=text))
        return sequences

    def plan_row(
        self, handle: Handle, options: Mapping[str, Any], seed: int | None, tokenizer: Any | None
    ) -> TokenSequence | None:
        """One sequence of a `generate` with these options; None if it must run as a call.

        That is so unless sequences can join a running batch, the options are those of a row, all
        tokens fit the positions, and no token of the prompt is padding, which would be masked.
        """
        config, prompt = self.abilities.generation, handle.prompt_ids
        if self.abilities.obstacle or not fits_row(options) or len(prompt) == 0:
            return None
        max_tokens = options["max_new_tokens"]
        size = len(prompt) + max_tokens
        positions = self.abilities.positions
        if max_tokens < 1 or size > self.max_batch_tokens or size > (positions or size):
            return None
        if config.get("pad_token_id") in prompt or self._is_own_length(options):
            return None
        eos = options.get("eos_token_id", config.get("eos_token_id"))
        if not all(isinstance(token, int) for token in list_end_ids(eos)):
            return None
        row = {n: v for n, v in options.items() if n not in ("max_new_tokens",)}
        if seed is not None:
            row["seed"] = seed
        plan = GenerationPlan(row, max_tokens, list_end_ids(eos))
        return self._make_sequence(handle, 0, plan, tokenizer)

    def _is_own_length(self, options: Mapping[str, Any]) -> bool:
        """Whether the generation config has a least length or time that the row would not keep."""
        config = self.abilities.generation
        return any(config.get(name) for name in ("min_length", "max_time", "stop_strings"))

    def _make_sequence(
        self, handle: Handle, index: int, plan: GenerationPlan, tokenizer: Any | None
    ) -> TokenSequence:
        text = None if tokenizer is None else self.make_text(handle, plan.stop, tokenizer)
        return TokenSequence(next(self._numbers), handle, index, handle.prompt_ids, plan, text)

    def make_text(self, handle: Handle, stop: tuple[str, ...], tokenizer: Any) -> TextStream:
        """What decodes a sequence: behind its prompt, unless that is an encoder's input."""
        context = () if self.abilities.has_encoder else handle.prompt_ids
        return TextStream(TextDecoder(tokenizer, context), stop)

    def _choose_length(self, prompt: int, given: int | None) -> int:
        """The greatest number of new tokens. Raises RequestError if it does not fit."""
        positions, config = self.abilities.positions, self.abilities.generation
        room = self.max_batch_tokens - prompt
        if positions is not None and not self.abilities.has_encoder:
            room = min(room, positions - prompt)
            if room < 1 or (given or 1) > positions - prompt:
                raise RequestError(
                    f"the prompt has {prompt} tokens, and max_tokens is {given or 1}, but the model"
                    f" has {positions} positions"
                )
        if given is not None:
            return given
        wanted = config.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        if not config.get("max_new_tokens") and config.get("max_length"):
            wanted = config["max_length"] - (0 if self.abilities.has_encoder else prompt)
        return max(1, min(wanted, room))
