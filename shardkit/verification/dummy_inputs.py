"""Inputs that any model of a kind can be run on, from its config alone, the same every time."""

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.verification.dummy_images import BATCH, image_token, image_tokens, make_images

LENGTH = 24
STEPS = 12  # tokens that may be generated after them
SEED = 20
FRAMES = 2  # of a spectrogram for each position, as the convolutions before it halve them
START = 1  # tokens before an image's
RESERVED = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Images, sound and token ids `[2, up to 24]`, as the model takes them, and a decoder's own.

    Where the text has places for images, each row has as many more as one image fills.  The model
    tells how many by running its vision, so every rank of a sharded one must call it.
    """
    inputs = {**make_images(model), **_sound(model)}
    taken = inspect.signature(model.forward).parameters
    if "input_ids" in taken:
        inputs |= _texts(model, inputs)
    elif "decoder_input_ids" in taken:
        inputs |= {"decoder_input_ids": _texts(model, {})["decoder_input_ids"]}
    return {name: value for name, value in inputs.items() if name in taken}


def _sound(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A spectrogram `[2, bands, frames]` of the one length that a model takes, or a wave `[2, n]`.

    Empty for a model that hears nothing.
    """
    config: Any = model.config
    name = model.main_input_name
    shape: tuple[int, ...]
    if name == "input_features" and hasattr(config, "max_source_positions"):
        shape = BATCH, int(config.num_mel_bins), FRAMES * int(config.max_source_positions)
    elif name == "input_values" and hasattr(config, "conv_stride"):
        shape = BATCH, LENGTH * math.prod(config.conv_stride)
    else:
        return {}
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(SEED))}


def _texts(model: PreTrainedModel, images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config: Any = model.config
    text = config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", None) or LENGTH + STEPS)
    longest = max(longest - STEPS, 1) if longest > 0 else LENGTH  # -1 is any length
    generator = torch.Generator().manual_seed(SEED)
    plain = _plain_tokens(config, int(text.vocab_size))

    def ids(length: int) -> torch.Tensor:
        return plain[torch.randint(0, len(plain), (BATCH, length), generator=generator)]

    inputs = {"input_ids": ids(min(LENGTH, longest))}
    if places := image_tokens(model, images):
        inputs = _with_places(inputs["input_ids"], image_token(model) or 0, places)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(min(LENGTH // 2, longest))
    return inputs


def _plain_tokens(config: Any, vocabulary: int) -> torch.Tensor:
    """The token ids that stand for text, and not for what is seen or heard."""
    stated = config.to_dict().items()
    reserved = [value for name, value in stated if RESERVED.fullmatch(name) and value is not None]
    every = torch.arange(vocabulary)
    return every[~torch.isin(every, torch.tensor(reserved, dtype=torch.int64))]


def _with_places(ids: torch.Tensor, token: int, places: int) -> dict[str, torch.Tensor]:
    """The same text with places for an image, and what tells them apart where a model asks."""
    image = torch.full((len(ids), places), token)
    ids = torch.cat([ids[:, :START], image, ids[:, START:]], 1)
    kinds = torch.zeros_like(ids)
    kinds[:, START : START + places] = 1
    return {"input_ids": ids, "token_type_ids": kinds, "mm_token_type_ids": kinds}
