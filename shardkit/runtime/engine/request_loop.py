"""The thread that drives an engine's ranks: one step of the batch, or one whole call, at a time.

Every choice that depends on a clock, a queue or a consumer is made here, between two steps. The
ranks only hear what to compute next.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from shardkit.errors import EngineBusy, RanksError, RanksLost, first_line
from shardkit.runtime.engine.channel import OnTokens
from shardkit.runtime.engine.controller import EngineRanks
from shardkit.runtime.engine.deadlines import DeadlineMonitor
from shardkit.runtime.engine.messages import Message, generate_request, step_request
from shardkit.runtime.engine.scheduler import Scheduler, Step, apply_choices
from shardkit.runtime.engine.sequence import TokenSequence

IDLE_POLL = 0.5  # seconds between two looks at idle ranks
PAUSE_AFTER = 2.0  # seconds without a request before the ranks wait without a collective


@dataclass
class Call:
    """One request to the ranks outside the batch: a forward pass, or a whole generate."""

    request: Message
    on_tokens: OnTokens | None = None
    future: "Future[Message]" = field(default_factory=Future)


class RequestLoop:
    """Runs calls and sequences on ranks, in a thread of its own, until it is closed.

    Args:
        ranks: What runs them.
        scheduler: The queue and the batch.
        can_join: Whether sequences join a running batch; else each batch is one generate.
    """

    def __init__(self, ranks: EngineRanks, scheduler: Scheduler, can_join: bool) -> None:
        self.failure: RanksError | None = None  # why the ranks can no longer be used
        self.num_steps = self.num_tokens = 0
        self._ranks, self._scheduler, self._can_join = ranks, scheduler, can_join
        self._calls: deque[Call] = deque()
        self._running_call: Call | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        self._last_request = time.monotonic()
        self._deadlines = DeadlineMonitor(self._describe_silence)
        self._thread = threading.Thread(target=self._run, name="shardkit-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """How many sequences and calls wait."""
        return len(self._scheduler.waiting) + len(self._calls)

    @property
    def num_running(self) -> int:
        """How many sequences and calls run."""
        return len(self._scheduler.running) + (self._running_call is not None)

    def add_call(self, call: Call) -> None:
        """Queue a call. Raises RanksLost, or EngineBusy."""
        with self._changed:
            self._check_open()
            if len(self._calls) >= self._scheduler.max_queue:
                raise EngineBusy(f"{len(self._calls)} calls wait, which is the most; try later")
            self._calls.append(call)
            self._changed.notify()

    def add_sequences(self, sequences: list[TokenSequence]) -> None:
        """Queue the sequences of one request. Raises RanksLost, EngineBusy or RequestError."""
        with self._changed:
            self._check_open()
            self._scheduler.add(sequences)
            self._deadlines.add(sequences[0].handle)
            self._changed.notify()

    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._changed:
            return not self._has_work() and self._running_call is None

    def close(self, error: RanksError) -> None:
        """Fail all that waits or runs, and end the thread; the ranks are not touched."""
        with self._changed:
            self._is_closed = True
            self._fail(error)
            self._changed.notify()
        self._deadlines.close()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._wait_for_work():
                    return
                call = self._calls.popleft() if self._calls else None
                self._running_call = call
                step = self._scheduler.plan_step() if self._can_join else None
                batch = [] if self._can_join or call else self._scheduler.take_compatible()
                self._scheduler.running = batch or self._scheduler.running
            try:
                if call:
                    self._run_call(call)
                if step:
                    self._run_step(step)
                if batch:
                    self._run_batch(batch)
            except Exception as error:  # a fault of ours, too, must not leave anybody waiting
                text = f"the engine failed: {type(error).__name__}: {first_line(error)}"
                with self._changed:
                    self._fail(error if isinstance(error, RanksLost) else RanksLost(text))
                self._ranks.close()
            self._running_call = None
            self._last_request = time.monotonic()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False if the loop is closed."""
        while not self._is_closed:
            if self.failure is None and self._has_work():
                return True
            self._changed.wait(IDLE_POLL)
            if self.failure is None and not self._is_closed and not self._has_work():
                try:
                    self._ranks.check()
                    if time.monotonic() - self._last_request > PAUSE_AFTER:
                        self._ranks.pause()
                except RanksError as error:
                    self._fail(error)
                    self._ranks.close()
        return False

    def _has_work(self) -> bool:
        return bool(self._calls or self._scheduler.waiting or self._scheduler.running)

    def _run_call(self, call: Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            response = self._ranks.request(call.request, call.on_tokens)[0]
        except Exception as error:  # also of the caller's own values, as they are encoded
            if not call.future.done():
                call.future.set_exception(error)
            if isinstance(error, RanksLost):
                raise
            return
        if not call.future.done():
            call.future.set_result(response)

    def _run_step(self, step: Step) -> None:
        join = [
            {
                "number": s.number, "ids": s.prompt, "num_logprobs": s.plan.num_logprobs,
                "options": {**s.plan.options, "max_new_tokens": s.plan.max_tokens},
            }
            for s in step.join
        ]  # fmt: skip
        try:
            response = self._ranks.request(step_request(step.tokens, join))[0].header
        except RanksLost:
            raise
        except RanksError as error:
            self._scheduler.fail_running(error)
            return
        failed = {int(number): reason for number, reason in response["failed"].items()}
        running = self._scheduler.running
        for sequence in running:
            if sequence.number in failed:
                sequence.handle.fail(RanksError(failed[sequence.number]))
        chosen = [s for s in running if s.number not in failed]
        apply_choices(chosen, response["choices"])
        self.num_steps += bool(chosen)  # in some, sequences leave and that is all
        self.num_tokens += len(chosen)

    def _run_batch(self, batch: list[TokenSequence]) -> None:
        """Generate sequences of one length by one call, each until it has all it wants."""

        def accept(tokens: list[int]) -> bool:
            for sequence, token in zip(batch, tokens, strict=True):
                sequence.accept(token)
            self.num_steps += 1
            self.num_tokens += sum(s.is_open for s in batch)
            return any(s.is_open for s in batch)

        try:
            self._ranks.request(make_batch_request(batch), accept)
        except RanksLost:
            raise
        except RanksError as error:
            self._scheduler.fail_running(error)
        for sequence in batch:  # which the model's own generate has ended for a reason of its own
            if sequence.is_open:
                sequence.handle.fail(RanksError("the model stopped before the request's end"))
        self._scheduler.running = []

    def _fail(self, error: RanksError) -> None:
        """End all that waits or runs, and refuse what comes."""
        self.failure = self.failure or error
        self._scheduler.fail_all(error)
        for call in [*self._calls, *filter(None, [self._running_call])]:
            if not call.future.done():
                call.future.set_exception(error)
        self._calls.clear()

    def _check_open(self) -> None:
        if self.failure is not None:
            raise RanksLost(str(self.failure))

    def _describe_silence(self) -> str:
        is_busy = time.monotonic() - self._last_request > IDLE_POLL
        return self._ranks.describe_silence() if is_busy else ""


def make_batch_request(batch: list[TokenSequence]) -> Message:
    """One streamed generate of sequences with prompts of one length."""
    first = batch[0].plan
    options = {name: value for name, value in first.options.items() if name != "seed"}
    options["max_new_tokens"] = max(s.plan.max_tokens for s in batch)
    inputs = {"input_ids": torch.tensor([s.prompt for s in batch])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return generate_request(inputs, options, seed=first.options.get("seed"), stream=True)
