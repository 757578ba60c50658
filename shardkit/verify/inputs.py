"""Inputs that any model of a kind can be run on, from its config alone, the same every time."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

BATCH = 2
LENGTH = 24
SEED = 20


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Token ids `[2, up to 24]`, and the decoder's own for an encoder-decoder."""
    config: Any = model.config
    text = config.get_text_config()
    vocabulary = int(text.vocab_size)
    longest = int(getattr(text, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(SEED)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (BATCH, length), generator=generator)

    inputs = {"input_ids": ids(min(LENGTH, longest))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(min(LENGTH // 2, longest))
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in taken}
