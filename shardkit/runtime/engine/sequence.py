"""One sequence of a request as the controller follows it: its text, and when it ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardkit.runtime.engine.handle import Chunk, FinishReason, Handle, TokenLogprob
from shardkit.runtime.engine.text_decoder import TextDecoder


@dataclass(frozen=True)
class GenerationPlan:
    """How a sequence is generated.

    Attributes:
        options: Arguments of transformers' `generate` for each row, with `seed`.
        max_tokens: The greatest number of new tokens.
        end_ids: The model's own end tokens.
        stop_ids: The request's, whose text is left out.
        stop: Texts before which it ends.
        num_logprobs: How many of the most probable tokens to report; None for no logprobs.
    """

    options: Mapping[str, Any]
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None


@dataclass
class TextStream:
    """Text as it comes, held back while it may be the beginning of a text to stop at."""

    decoder: TextDecoder
    stop: tuple[str, ...]
    pending: str = ""
    reason: str | None = None  # the text that was stopped at

    def add(self, token: int) -> str:
        """The text that is sure, once this token has come."""
        return self._release(self.decoder.add(token))

    def flush(self) -> str:
        """What has been held back."""
        text = self._release(self.decoder.flush()) + self.pending
        self.pending = ""
        return text

    def _release(self, piece: str) -> str:
        if self.reason is not None:
            return ""
        self.pending += piece
        starts = {self.pending.find(text): text for text in self.stop if text in self.pending}
        if starts:
            start = min(starts)
            self.reason, text, self.pending = starts[start], self.pending[:start], ""
            return text
        size = len(self.pending) - count_held_back(self.pending, self.stop)
        text, self.pending = self.pending[:size], self.pending[size:]
        return text


@dataclass
class TokenSequence:
    """A sequence that waits, or is generated.

    Attributes:
        number: What the ranks know it by.
        handle: The request it belongs to.
        index: Which of its n sequences.
        prompt: Token ids.
        text: Its text, if that is wanted.
        ids: The new token ids.
    """

    number: int
    handle: Handle
    index: int
    prompt: tuple[int, ...]
    plan: GenerationPlan
    text: TextStream | None = None
    ids: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it is to be generated any further."""
        return not (self.finished or self.handle.done)

    @property
    def num_tokens(self) -> int:
        """The greatest number of tokens it may have, prompt included."""
        return len(self.prompt) + self.plan.max_tokens

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token, and give its handle what it adds."""
        if not self.is_open:
            return
        self.ids.append(token)
        reason = self._find_reason(token)
        stop_reason: str | int | None = token if token in self.plan.stop_ids else None
        text = ""
        if self.text is not None:
            if stop_reason is None and token not in self.plan.end_ids:
                text = self.text.add(token)
            if self.text.reason is None and reason is not None:
                text += self.text.flush()
            if self.text.reason is not None:
                reason, stop_reason = "stop", self.text.reason
        self.finished = reason is not None
        logprobs = () if logprob is None else (logprob,)
        self.handle.add(Chunk(self.index, (token,), text, logprobs, reason, stop_reason))

    def _find_reason(self, token: int) -> FinishReason | None:
        if token in self.plan.stop_ids or token in self.plan.end_ids:
            return "stop"
        return "length" if len(self.ids) >= self.plan.max_tokens else None


def count_held_back(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of a text that a text to stop at begins with."""
    longest = max(map(len, stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(other.startswith(text[-size:]) for other in stop):
            return size
    return 0
