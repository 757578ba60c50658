"""Chooses each row's next token as transformers' `generate` does, each row by its own options.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList

from shardkit.errors import MODEL_ERRORS, first_line


@dataclass(frozen=True)
class Choice:
    """A chosen token.

    Attributes:
        token: Its id.
        logprob: The natural logarithm of its probability, before any processor; None unless asked.
        top: The most probable ids and their logprobs, as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class RowSampler:
    """How one row's tokens are chosen.

    Attributes:
        ids: The row's tokens so far `[1, T]`, int64, the prompt included.
        processors: transformers' own, for this row's options.
        generator: Draws the row's samples; None for greedy decoding.
        num_logprobs: How many of the most probable tokens to report; None for no logprobs at all.
    """

    ids: torch.Tensor
    processors: LogitsProcessorList
    generator: torch.Generator | None
    num_logprobs: int | None

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, given its logits `[V]`; it is appended to `ids`."""
        scores = self.processors(self.ids, logits[None].clone())
        if self.generator is None:
            token = scores.argmax(-1)
        else:
            probabilities = scores.softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        self.ids = torch.cat([self.ids, token[:, None]], -1)
        return self._describe(int(token), logits)

    def _describe(self, token: int, logits: torch.Tensor) -> Choice:
        if self.num_logprobs is None:
            return Choice(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(self.num_logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Choice(token, float(logprobs[token]), top)


def make_sampler(
    model: PreTrainedModel,
    prompt: Sequence[int],
    options: Mapping[str, Any],
    num_logprobs: int | None,
    device: torch.device,
) -> RowSampler:
    """The sampler of a row.

    Args:
        model: Its generation config is the default.
        prompt: The prompt's token ids.
        options: Arguments of `generate`, and `seed`; None there is a random one.
        num_logprobs: As of `RowSampler`.
        device: Where the logits are.

    Raises:
        ValueError: transformers refuses the options.
    """
    ids = torch.tensor([list(prompt)], device=device)
    plain = {name: value for name, value in options.items() if name != "seed"}
    config, unknown = model._prepare_generation_config(None, **plain)
    if unknown:
        raise ValueError(f"generate has no option {next(iter(unknown))}")
    model._prepare_special_tokens(config, True, device=device, batch_size=1)
    config = model._prepare_generated_length(config, False, True, "input_ids", ids.shape[1], ids)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids, device=device
    )
    generator = None
    if config.do_sample:
        generator = torch.Generator(device)
        seed = options.get("seed")
        generator.seed() if seed is None else generator.manual_seed(seed)
    return RowSampler(ids, processors, generator, num_logprobs)


def choose_tokens(samplers: Sequence[RowSampler], logits: torch.Tensor) -> list[Choice | str]:
    """The next token of each row, given the logits `[B, V]`; or why there is none.

    A row can fail by its own options: a temperature near 0 makes infinite scores of any logits.
    """
    plain = [
        at for at, s in enumerate(samplers)
        if s.generator is None and s.num_logprobs is None and not s.processors
    ]  # fmt: skip
    choices: dict[int, Choice | str] = {}
    if plain:  # one call for all of them; no processor needs their tokens so far
        tokens = logits[plain].argmax(-1).tolist()
        choices = {at: Choice(token) for at, token in zip(plain, tokens, strict=True)}
    for at, sampler in enumerate(samplers):
        if at not in choices:
            try:
                choices[at] = sampler.choose(logits[at])
            except MODEL_ERRORS as error:
                choices[at] = first_line(error)
    return [choices[at] for at in range(len(samplers))]
