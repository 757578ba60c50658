"""Which sequences are generated next: admission between steps, in the order they came.

Arithmetic alone: no thread, clock, rank or tensor. The ranks do what a `Step` says.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardkit.errors import EngineBusy, RequestError
from shardkit.runtime.engine.handle import TokenLogprob
from shardkit.runtime.engine.sequence import TokenSequence

ChosenToken = tuple[int, float | None, list[tuple[float, float]]]  # its id, logprob, top ones
MAX_PREFILL = 4096  # prompt tokens of one step, unless one prompt alone has more


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine takes on at once.

    Args:
        max_batch_size: Sequences that are generated together.
        max_queue: Sequences that wait; a request beyond is refused with EngineBusy.
        max_batch_tokens: Tokens that the KV cache may have, over all sequences of the batch: their
            number times the longest, prompt and new tokens. None means what half of the memory has
            room for that is free once the model is loaded.

    Raises:
        RequestError: A number is below 1.
    """

    max_batch_size: int = 32
    max_queue: int = 1024
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise RequestError(f"{name}={value!r}: it must be an integer from 1")


@dataclass(frozen=True)
class Step:
    """What the ranks do in one step.

    Attributes:
        tokens: The last token of each sequence that stays, by number; every other leaves.
        join: The sequences whose prompts join.
        leaves: Whether a sequence leaves.
    """

    tokens: Mapping[int, int]
    join: tuple[TokenSequence, ...]
    leaves: bool

    def __bool__(self) -> bool:
        return bool(self.tokens or self.join or self.leaves)


@dataclass
class Scheduler:
    """The queue and the running batch."""

    max_batch_size: int
    max_queue: int
    max_batch_tokens: int
    waiting: deque[TokenSequence] = field(default_factory=deque)
    running: list[TokenSequence] = field(default_factory=list)

    def add(self, sequences: list[TokenSequence]) -> None:
        """Queue the sequences of a request.

        Raises:
            EngineBusy: The queue has no room for them.
            RequestError: They never have room: one is longer than the batch may be.
        """
        longest = max(sequence.num_tokens for sequence in sequences)
        if longest > self.max_batch_tokens:
            raise RequestError(
                f"the prompt and max_tokens make {longest} tokens, but the KV cache has room for"
                f" {self.max_batch_tokens}; give a smaller max_tokens"
            )
        if len(self.waiting) + len(sequences) > self.max_queue:
            self._forget_closed()  # what was cancelled leaves room at once
        if len(self.waiting) + len(sequences) > self.max_queue:
            raise EngineBusy(
                f"{len(self.waiting)} sequences wait, of at most {self.max_queue}; try again later"
            )
        self.waiting.extend(sequences)

    def plan_step(self) -> Step:
        """The next step. Sequences that are done leave, and those that fit join."""
        self._forget_closed()
        before = len(self.running)
        self.running = [s for s in self.running if s.is_open]  # which a caller may change any time
        leaves = len(self.running) < before
        tokens = {s.number: s.ids[-1] for s in self.running}
        join = tuple(self._admit())
        self.running += join
        return Step(tokens, join, leaves)

    def take_compatible(self) -> list[TokenSequence]:
        """The next sequences that one call of `generate` can run, out of the queue.

        They have prompts of one length, and options that are the same and draw no samples.
        """
        self._forget_closed()
        taken: list[TokenSequence] = []
        others: deque[TokenSequence] = deque()
        for sequence in self.waiting:
            if not taken or (_matches(taken[0], sequence) and self._has_room(taken, sequence)):
                taken.append(sequence)
            else:
                others.append(sequence)
        self.waiting = others
        return taken

    def fail_all(self, error: BaseException) -> None:
        """End every request with an error."""
        for sequence in [*self.running, *self.waiting]:
            sequence.handle.fail(error)
        self.running, self.waiting = [], deque()

    def fail_running(self, error: BaseException) -> None:
        """End the requests of the running batch, which the ranks have dropped."""
        for sequence in self.running:
            sequence.handle.fail(error)
        self.running = []

    def _forget_closed(self) -> None:
        self.waiting = deque(s for s in self.waiting if s.is_open)

    def _has_room(self, batch: list[TokenSequence], sequence: TokenSequence) -> bool:
        longest = max(s.num_tokens for s in (*batch, sequence))
        fits = (len(batch) + 1) * longest <= self.max_batch_tokens
        return fits and len(batch) < self.max_batch_size

    def _admit(self) -> Iterable[TokenSequence]:
        longest = max((s.num_tokens for s in self.running), default=0)
        size, prefill = len(self.running), 0
        while self.waiting and size < self.max_batch_size:
            new = self.waiting[0]
            longest = max(longest, new.num_tokens)
            prefill += len(new.prompt)
            if (size + 1) * longest > self.max_batch_tokens and size:
                return
            if prefill > MAX_PREFILL and prefill > len(new.prompt):
                return
            size += 1
            yield self.waiting.popleft()


def apply_choices(
    running: Iterable[TokenSequence],
    choices: Mapping[str, tuple[int, float | None, list[list[float]]]],
) -> None:
    """Give each sequence the token that was chosen for it: its id, logprob, and the top ones."""
    for sequence in running:
        token, logprob, top = choices[str(sequence.number)]
        described = None
        if logprob is not None:
            described = TokenLogprob(token, logprob, tuple((int(i), value) for i, value in top))
        sequence.accept(token, described)


def _matches(first: TokenSequence, other: TokenSequence) -> bool:
    same = first.plan.options == other.plan.options and len(first.prompt) == len(other.prompt)
    return same and first.plan.options.get("do_sample") is False
