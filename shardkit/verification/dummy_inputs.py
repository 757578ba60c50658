"""Inputs that any model of a kind can run on, from its config alone, the same every time.

Shapes: B batch (always 2), T tokens.
"""

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit import config_fields as fields
from shardkit.runtime.model_runner import Tensors, move_inputs
from shardkit.verification.dummy_images import BATCH, make_images
from shardkit.verification.input_table import Placeholders, find_input_table

LENGTH = 24
SIZES = {"batch": BATCH, "length": LENGTH}
STEPS = 12  # tokens that may be generated after them
TEXT_SEED = 20
CLASSIFIES = "ForSequenceClassification"
CHOOSES = "ForMultipleChoice"  # how a class is called whose texts have several endings each
FRAMES_PER_POSITION = 2  # of a spectrogram, because the convolutions halve them
TOKENS_BEFORE_IMAGE = 1
KINDS = ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask")  # what models call it
RESERVED = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that a forward pass of a model needs, by argument name.

    Returns:
        As far as the model has such arguments: images, audio, token ids `[B, T]` with T up to 24,
        and the token ids of a decoder. If text has placeholders for images, T is larger by the
        number of tokens that one image fills. The model's own vision tower determines that number,
        so every rank of a sharded model must call this.
    """
    arguments = inspect.signature(model.forward).parameters
    table = find_input_table(model.config.model_type)
    extra = {} if table is None else table.make_tensors(SIZES, model.config)
    images = {} if "pixel_values" in extra else make_images(model)
    audio = {} if model.main_input_name in extra else _make_audio(model)
    inputs = {**images, **audio}
    if "input_ids" in arguments:
        inputs |= _make_texts(model, _list_placeholders(model, inputs, extra))
    elif "decoder_input_ids" in arguments:
        inputs |= {"decoder_input_ids": _make_texts(model, [])["decoder_input_ids"]}
    names = arguments.keys() - (frozenset() if table is None else table.exclusions)
    inputs = {name: value for name, value in {**inputs, **extra}.items() if name in names}
    if is_limited_to_one(model):
        return {name: value[: len(value) // BATCH] for name, value in inputs.items()}
    if type(model).__name__.endswith(CHOOSES):  # one choice for each text
        return {name: value.unsqueeze(1) for name, value in inputs.items()}
    return inputs


def is_limited_to_one(model: PreTrainedModel) -> bool:
    """Whether a model refuses batches: without a padding token some classes find no last token."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return type(model).__name__.endswith(CLASSIFIES) and padding is None


def count_image_tokens(model: PreTrainedModel, images: Tensors) -> int:
    """How many tokens of each text one image fills; 0 for a model without placeholders.

    Runs the model's vision tower, so every rank of a sharded model must call it.
    """
    vision_model: Any = model if hasattr(model, "get_image_features") else model.base_model
    has_features = hasattr(vision_model, "get_image_features")
    if not images or not has_features or find_image_token(model) is None:
        return 0
    with torch.inference_mode():
        features = vision_model.get_image_features(
            **move_inputs(images, model, model.device)
        ).pooler_output
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    return sum(part.shape[:-1].numel() for part in parts) // BATCH


def count_positions(model: PreTrainedModel) -> int:
    """How many positions a sequence of the dummy inputs may fill, those generated included.

    Never more than the inputs need. A table of positions with a padding row has its first position
    after that row.
    """
    text: Any = model.config.get_text_config()
    stated = [getattr(text, name, None) for name in fields.POSITIONS]
    counts = [value for value in stated if type(value) is int and value > 0]  # -1 is any length
    if not counts:
        return LENGTH + STEPS
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    unused = [t.padding_idx + 1 for t in tables if t.padding_idx and t.num_embeddings in counts]
    return min(LENGTH + STEPS, max(min(counts) - max(unused, default=0), 1))


def count_steps(model: PreTrainedModel, inputs: Tensors) -> int:
    """How many tokens may be generated after these inputs: as many as there are positions for."""
    ids = inputs.get("input_ids")
    if ids is None or model.config.is_encoder_decoder:
        return min(STEPS, count_positions(model))
    placeholders = _list_placeholder_ids(model)
    num_text = int((~torch.isin(ids[0], placeholders.to(ids.device))).sum())
    return max(min(STEPS, count_positions(model) - num_text + 1), 1)


def find_image_token(model: PreTrainedModel) -> int | None:
    """The id of the token that stands for a part of an image."""
    fields = (getattr(model.config, n, None) for n in ("image_token_id", "image_token_index"))
    return next((int(token) for token in fields if token is not None), None)


def has_placeholders(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether a text has tokens that stand for images or sounds."""
    return bool(torch.isin(ids, _list_placeholder_ids(model)).any())


def _make_audio(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A spectrogram `[B, bands, frames]` of the one length that a model takes, or a wave `[B, n]`.

    Empty for a model without audio.
    """
    config: Any = model.config
    name = model.main_input_name
    shape: tuple[int, ...]
    if name == "input_features" and hasattr(config, "max_source_positions"):
        frames = FRAMES_PER_POSITION * int(config.max_source_positions)
        shape = BATCH, int(config.num_mel_bins), frames
    elif name == "input_values" and hasattr(config, "conv_stride"):
        shape = BATCH, LENGTH * math.prod(config.conv_stride)
    else:
        return {}
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(TEXT_SEED))}


def _list_placeholders(
    model: PreTrainedModel, images: Tensors, extra: Tensors
) -> list[Placeholders]:
    """The tokens that stand for the images and sounds of a text."""
    table = find_input_table(model.config.model_type)
    if table is not None and table.placeholders:
        takes_any = extra.keys() & inspect.signature(model.forward).parameters.keys()
        return table.list_placeholders(SIZES, model.config) if takes_any else []
    count = count_image_tokens(model, {**images, **extra})
    return [Placeholders(find_image_token(model) or 0, count)] if count else []


def _list_placeholder_ids(model: PreTrainedModel) -> torch.Tensor:
    """The ids of the tokens that stand for images and sounds."""
    table = find_input_table(model.config.model_type)
    tokens = [] if table is None else table.list_placeholders(SIZES, model.config)
    image = find_image_token(model)
    ids = [each.token for each in tokens] + ([] if image is None else [image])
    return torch.tensor(ids, dtype=torch.int64)


def _make_texts(
    model: PreTrainedModel, placeholders: Sequence[Placeholders]
) -> dict[str, torch.Tensor]:
    config: Any = model.config
    text = _find_text_config(config)
    positions = count_positions(model)
    longest = max(positions - STEPS, positions // 2, 1)
    generator = torch.Generator().manual_seed(TEXT_SEED)
    plain = _list_plain_tokens(config, int(text.vocab_size))
    end = getattr(text, "eos_token_id", None)
    classifies = type(model).__name__.endswith(CLASSIFIES)
    has_end = classifies and isinstance(end, int) and end < text.vocab_size
    plain = plain[plain != end] if has_end else plain

    def random_ids(length: int) -> torch.Tensor:
        return plain[torch.randint(0, len(plain), (BATCH, length), generator=generator)]

    inputs = {"input_ids": random_ids(min(LENGTH, longest))}
    if placeholders:
        inputs = _insert_placeholders(inputs["input_ids"], placeholders)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if has_end and end is not None:
        inputs["input_ids"][:, -1] = end  # the one from whose state some tell a text's class
    decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if decodes and not classifies:  # which give the decoder the same text
        inputs["decoder_input_ids"] = random_ids(min(LENGTH // 2, longest))
    return inputs


def _find_text_config(config: Any) -> Any:
    """The config of the text model, however deep inside of the whole config."""
    text = config.get_text_config()
    if hasattr(text, "vocab_size"):
        return text
    return _find_text_config(getattr(config, next(iter(config.sub_configs))))


def _list_plain_tokens(config: Any, vocabulary: int) -> torch.Tensor:
    """The token ids of text, without those of images, video and audio."""
    fields = config.to_dict().items()
    reserved = [value for name, value in fields if RESERVED.fullmatch(name) and value is not None]
    ids = torch.arange(vocabulary)
    return ids[~torch.isin(ids, torch.tensor(reserved, dtype=torch.int64))]


def _insert_placeholders(
    ids: torch.Tensor, placeholders: Sequence[Placeholders]
) -> dict[str, torch.Tensor]:
    """The same text with placeholders after its first token, and the kind of each token."""
    tokens = torch.cat([torch.full((each.count,), each.token) for each in placeholders])
    kinds = torch.cat([torch.full((each.count,), each.kind) for each in placeholders])
    at = TOKENS_BEFORE_IMAGE

    def insert(text: torch.Tensor, inserted: torch.Tensor) -> torch.Tensor:
        return torch.cat([text[:, :at], inserted.expand(len(text), -1), text[:, at:]], 1)

    kinds = insert(torch.zeros_like(ids), kinds)
    return {"input_ids": insert(ids, tokens), **dict.fromkeys(KINDS, kinds)}
