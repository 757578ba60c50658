"""The JSON of answers: completions and chats, whole or in chunks. Arithmetic alone."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardkit.runtime import Chunk, Completion, RequestResult, TokenLogprob

DecodeToken = Callable[[int], str]
LEAST_LOGPROB = -9999.0  # for a token of probability 0, since JSON has no infinity


@dataclass(frozen=True)
class AnswerForm:
    """How answers of one endpoint look.

    Attributes:
        is_chat: Whether they are messages.
        model: What the model is called.
        decode: The text of one token.
        with_ids: Whether choices have token ids.
        identifier: What the answer is called.
        created: When it was asked for, in seconds since 1970.
    """

    is_chat: bool
    model: str
    decode: DecodeToken
    with_ids: bool = False
    identifier: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def make_answer(self, results: Sequence[RequestResult]) -> dict[str, Any]:
        """The whole answer: the completions of each prompt in turn, and the tokens used."""
        choices = [
            self._make_choice(at * len(result.completions) + each.index, each)
            for at, result in enumerate(results)
            for each in result.completions
        ]
        return self._head(chunked=False) | {"choices": choices, "usage": count_usage(results)}

    def make_chunk(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """One chunk of choice number `index`."""
        choice: dict[str, Any] = {"index": index, "finish_reason": chunk.finish_reason}
        choice |= self._make_text("delta", chunk.text)
        choice["logprobs"] = self._make_logprobs(chunk.logprobs)
        if chunk.stop_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        if self.with_ids:
            choice["token_ids"] = list(chunk.ids)
        return self._head(chunked=True) | {"choices": [choice]}

    def make_opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a message, which says whose it is."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "finish_reason": None}
        return self._head(chunked=True) | {"choices": [choice]}

    def make_usage(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The last chunk, if the number of tokens is asked for."""
        return self._head(chunked=True) | {
            "choices": [], "usage": make_usage(prompt_tokens, new_tokens),
        }  # fmt: skip

    def _head(self, chunked: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if chunked else "chat.completion"
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.identifier}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _make_choice(self, index: int, each: Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": each.finish_reason}
        choice |= self._make_text("message", each.text)
        choice["logprobs"] = self._make_logprobs(each.logprobs)
        choice["stop_reason"] = each.stop_reason
        return choice | ({"token_ids": list(each.ids)} if self.with_ids else {})

    def _make_text(self, name: str, text: str) -> dict[str, Any]:
        if not self.is_chat:
            return {"text": text}
        role = {"role": "assistant"} if name == "message" else {}
        return {name: {**role, "content": text}}

    def _make_logprobs(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        listed = list(logprobs)
        if not listed:
            return None
        if self.is_chat:
            return {"content": [self._describe_token(each) for each in listed]}
        return {
            "tokens": [self.decode(each.token) for each in listed],
            "token_logprobs": [max(each.logprob, LEAST_LOGPROB) for each in listed],
            "top_logprobs": [
                {self.decode(token): max(value, LEAST_LOGPROB) for token, value in each.top}
                for each in listed
            ],
        }

    def _describe_token(self, each: TokenLogprob) -> dict[str, Any]:
        top = [self._describe_one(token, value) for token, value in each.top]
        return self._describe_one(each.token, each.logprob) | {"top_logprobs": top}

    def _describe_one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}


def count_usage(results: Iterable[RequestResult]) -> dict[str, int]:
    """The tokens of prompts and of answers."""
    listed = list(results)
    new = sum(len(each.ids) for result in listed for each in result.completions)
    return make_usage(sum(len(result.prompt_ids) for result in listed), new)


def make_usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
