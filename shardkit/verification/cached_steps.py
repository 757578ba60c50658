"""Decoding with a cache, the same tokens for every model, so that each step has equal inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from shardkit.runtime.model_runner import ModelRunner, Tensors
from shardkit.verification.block_runs import Action
from shardkit.verification.models import greedy_options, select_prompt

CACHED_STEPS = 2  # tokens computed from a cache, after the prompt has filled it


class ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Makes a model generate given tokens `[B, S]`, so that every model gets the same inputs."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[B, V]` that leave the next of the tokens alone."""
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self._tokens[: len(scores), self._step, None], 0.0)
        self._step += 1
        return forced


def make_cached_action(inputs: Tensors, steps: int) -> Action:
    """A call that fills a cache from a prompt, and computes at most a few tokens from it."""
    prompt, count = select_prompt(inputs), min(steps, CACHED_STEPS + 1)
    text = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    batch = len(next(iter(inputs.values())))
    if text is None or text.ndim != 2 or text.shape[1] < count:
        text = torch.arange(1, count + 1).expand(batch, -1)
    tokens = text[:, -count:]

    def generate(runner: ModelRunner) -> object:
        processors = LogitsProcessorList([ForcedTokens(tokens)])
        options: Mapping[str, Any] = {**greedy_options(count), "logits_processor": processors}
        return runner.generate(prompt, options)

    return generate
