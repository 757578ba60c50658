"""A batch that sequences join and leave between two steps, over transformers' ordinary cache.

Shapes: B rows, T tokens of the longest prompt, L columns of the cache, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from shardkit.runtime.batching.cache_layers import (
    append_rows,
    count_layer_bytes,
    resize_layer,
    select_rows,
)

FREE_PADDING = 256  # tokens of padding that a prefill may have however short its prompts are


@dataclass
class Rows:
    """What the model has computed of some sequences, which end at the same column.

    Attributes:
        lengths: The number of tokens of each row, without padding.
        name: How the model's forward calls its cache.
        cache: The cache, of L columns.
    """

    lengths: list[int]
    name: str
    cache: Any


@dataclass
class RunningBatch:
    """The sequences that are being generated, by number, in the order of their rows."""

    model: PreTrainedModel
    device: torch.device
    numbers: list[int] = field(default_factory=list)
    _rows: Rows | None = None

    def clear(self) -> None:
        """Drop every sequence."""
        self.numbers, self._rows = [], None

    def drop(self, numbers: Sequence[int]) -> None:
        """Let sequences leave; what is then padding in every row is trimmed."""
        kept = [at for at, number in enumerate(self.numbers) if number not in set(numbers)]
        if len(kept) == len(self.numbers):
            return
        if not kept or self._rows is None:
            self.clear()
            return
        rows, index = self._rows, torch.tensor(kept, device=self.device)
        self.numbers = [self.numbers[at] for at in kept]
        rows.lengths = [rows.lengths[at] for at in kept]
        for layer in rows.cache.layers:
            select_rows(layer, index)
            resize_layer(layer, max(rows.lengths))

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """One step: each row's next token goes in, and the logits `[B, V]` after it come out."""
        assert self._rows is not None
        rows = self._rows
        ids = torch.tensor(tokens, device=self.device)[:, None]
        rows.lengths = [length + 1 for length in rows.lengths]
        return self._run(ids, rows, is_first=False)

    def prefill(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run prompts, which join as the last rows; the logits `[B, V]` after each."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        rows = make_rows(self.model, [len(prompt) for prompt in prompts])
        logits = self._run(torch.tensor(padded, device=self.device), rows, is_first=True)
        self._join(rows)
        self.numbers = [*self.numbers, *numbers]
        return logits

    def _run(self, ids: torch.Tensor, rows: Rows, is_first: bool) -> torch.Tensor:
        """A forward pass as transformers' `generate` makes it, masks and positions included."""
        mask = make_mask(rows.lengths, self.device)
        is_padded = min(rows.lengths) < max(rows.lengths)
        arguments: dict[str, Any] = {rows.name: rows.cache, "use_cache": True}
        if has_argument(self.model, "position_ids"):
            arguments["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if has_argument(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if is_first else 1,
            attention_mask=mask if is_padded else None,
            is_first_iteration=is_first,
            **arguments,
        )
        logits: torch.Tensor = self.model(**inputs, return_dict=True).logits[:, -1]
        return logits.to(torch.float32)

    def _join(self, new: Rows) -> None:
        if self._rows is None:
            self._rows = new
            return
        rows = self._rows
        rows.lengths = rows.lengths + new.lengths
        for layer, other in zip(rows.cache.layers, new.cache.layers, strict=True):
            resize_layer(layer, max(rows.lengths))
            resize_layer(other, max(rows.lengths))
            append_rows(layer, other)


def make_rows(model: PreTrainedModel, lengths: list[int]) -> Rows:
    """Rows with an empty cache, such as `generate` would make for this model."""
    kwargs: dict[str, Any] = {}
    model._prepare_cache_for_generation(
        model._prepare_generation_config(None)[0], kwargs, GenerationMode.GREEDY_SEARCH,
        len(lengths), max(lengths),
    )  # fmt: skip
    ((name, cache),) = kwargs.items()
    return Rows(lengths, name, cache)


def make_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """The attention mask `[B, L]`, int64, of rows that end at the same column."""
    columns = torch.arange(max(lengths), device=device)
    starts = max(lengths) - torch.tensor(lengths, device=device)
    return (columns >= starts[:, None]).long()


def group_prompts(lengths: Sequence[int], may_pad: bool) -> list[list[int]]:
    """Which prompts, by index, run in one forward pass, so that little of it is padding.

    Args:
        lengths: The number of tokens of each prompt.
        may_pad: Whether prompts of different lengths may run together.
    """
    groups: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if groups:
            longest = lengths[groups[-1][0]]
            tokens = sum(lengths[other] for other in groups[-1]) + lengths[at]
            padding = longest * (len(groups[-1]) + 1) - tokens
            fits = padding <= max(tokens, FREE_PADDING) if may_pad else lengths[at] == longest
            if fits:
                groups[-1].append(at)
                continue
        groups.append([at])
    return groups


def measure_token_bytes(model: PreTrainedModel, device: torch.device, tokens: int = 2) -> int:
    """The bytes that each token adds to this rank's cache, from a prompt of `tokens`."""
    rows, batch = make_rows(model, [tokens]), RunningBatch(model, device)
    batch._run(torch.ones(1, tokens, dtype=torch.int64, device=device), rows, is_first=True)
    return sum(map(count_layer_bytes, rows.cache.layers)) // tokens


def has_argument(model: PreTrainedModel, argument: str) -> bool:
    """Whether a model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters
