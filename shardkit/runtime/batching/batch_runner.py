"""One rank's part of the running batch: does what a step says, and on rank 0 chooses the tokens.

The other ranks choose nothing: they learn each sequence's last token from the next step, so that
no choice depends on how a rank rounds or draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.errors import MODEL_ERRORS, RanksError, first_line
from shardkit.runtime.batching.running_batch import RunningBatch, group_prompts
from shardkit.runtime.batching.support import may_pad_prompts
from shardkit.runtime.batching.token_sampler import Choice, RowSampler, choose_tokens, make_sampler
from shardkit.runtime.model_runner import run_inference


@dataclass(frozen=True)
class JoiningPrompt:
    """A sequence that joins: its number, prompt and options, as `make_sampler` takes them."""

    number: int
    ids: Sequence[int]
    options: Mapping[str, Any]
    num_logprobs: int | None


@dataclass
class StepResult:
    """What a step has made.

    Attributes:
        choices: The chosen tokens, by number.
        failed: Why sequences failed, by number.
        refused: Why the model refused prompts, which every rank finds alike; "" if it did not.
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    refused: str = ""


class BatchRunner:
    """The running batch of one rank. Every rank must make one at a time: it tries the model.

    Args:
        model: This rank's part of the model.
        device: Where it is.
        is_sampler: Whether this rank chooses the tokens.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, is_sampler: bool) -> None:
        self._model, self._device, self._is_sampler = model, device, is_sampler
        self._batch = RunningBatch(model, device)
        self._samplers: dict[int, RowSampler] = {}
        self._may_pad = may_pad_prompts(model, device)

    def clear(self) -> None:
        """Drop every sequence."""
        self._batch.clear()
        self._samplers.clear()

    def run_step(self, tokens: Mapping[int, int], join: Sequence[JoiningPrompt]) -> StepResult:
        """Do one step: sequences without a token leave, the others grow by it, and prompts join.

        Raises RanksError or one of MODEL_ERRORS if the running sequences cannot go on; they are
        then dropped. A prompt that fails is a part of the result.
        """
        result = StepResult()
        with run_inference(self._model.dtype):
            try:
                self._decode(tokens, result)
                groups = group_prompts([len(prompt.ids) for prompt in join], self._may_pad)
                for group in groups:
                    self._prefill([join[at] for at in group], result)
            except BaseException:
                self.clear()
                raise
        return result

    def _decode(self, tokens: Mapping[int, int], result: StepResult) -> None:
        leave = [number for number in self._batch.numbers if number not in tokens]
        self._batch.drop(leave)
        for number in leave:
            self._samplers.pop(number, None)
        if numbers := self._batch.numbers:
            logits = self._batch.decode([tokens[number] for number in numbers])
            self._choose(numbers, logits, result)

    def _prefill(self, prompts: Sequence[JoiningPrompt], result: StepResult) -> None:
        numbers = [prompt.number for prompt in prompts]
        if self._is_sampler:  # what fails here must not keep this rank from the forward pass
            for prompt in prompts:
                self._add_sampler(prompt, result)
        try:
            logits = self._batch.prefill(numbers, [prompt.ids for prompt in prompts])
        except RanksError:
            raise
        except MODEL_ERRORS as error:
            result.refused = first_line(error)
            result.failed |= dict.fromkeys(numbers, result.refused)
            for number in numbers:
                self._samplers.pop(number, None)
            return
        self._choose(numbers, logits, result)

    def _add_sampler(self, prompt: JoiningPrompt, result: StepResult) -> None:
        try:
            self._samplers[prompt.number] = make_sampler(
                self._model, prompt.ids, prompt.options, prompt.num_logprobs, self._device
            )
        except MODEL_ERRORS as error:
            result.failed[prompt.number] = first_line(error)

    def _choose(self, numbers: Sequence[int], logits: torch.Tensor, result: StepResult) -> None:
        if not self._is_sampler:
            return
        rows = [at for at, number in enumerate(numbers) if number in self._samplers]
        samplers = [self._samplers[numbers[at]] for at in rows]
        for at, choice in zip(rows, choose_tokens(samplers, logits[rows]), strict=True):
            if isinstance(choice, str):
                result.failed[numbers[at]] = choice
            else:
                result.choices[numbers[at]] = choice
