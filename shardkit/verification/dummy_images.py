"""Images that any model that sees can be run on, from its config alone, the same every time."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.runtime.model_runner import fitted

BATCH = 2
SEED = 21
GRID = (4, 6)  # merged patches of an image whose size is free: more than one window of attention
CHANNELS = ("num_channels", "in_channels", "in_chans")


def make_images(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two images as the model takes them: `[2, channels, height, width]`, or patches and a grid.

    Empty for a model that sees none.
    """
    taken = inspect.signature(model.forward).parameters
    if "pixel_values" not in taken:
        return {}
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or config
    channels = next(int(getattr(vision, name)) for name in CHANNELS if hasattr(vision, name))
    if "image_grid_thw" in taken:
        return _patches(vision, channels)
    if sized := _takes_sizes(model, vision):
        merge = int(getattr(config, "spatial_merge_size", None) or 1)
        height, width = (n * merge * _pair(vision.patch_size)[0] for n in GRID)
    else:
        height, width = _pair(vision.image_size)
    images = {"pixel_values": _noise(BATCH, channels, height, width)}
    if sized:
        images["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    if "pixel_attention_mask" in taken:  # several images for each text: one here
        images["pixel_values"] = images["pixel_values"].unsqueeze(1)
        images["pixel_attention_mask"] = torch.ones(BATCH, 1, height, width, dtype=torch.bool)
    return images


def image_tokens(model: PreTrainedModel, images: Mapping[str, torch.Tensor]) -> int:
    """How many places in each text the model fills with what it sees; 0 for one that has none.

    Runs the model's own vision, so every rank of a sharded one must call it.
    """
    if not images or image_token(model) is None:
        return 0
    found: Any = model
    with torch.inference_mode():
        seen = found.get_image_features(**fitted(images, model, model.device)).pooler_output
    parts = [seen] if isinstance(seen, torch.Tensor) else list(seen)
    return sum(part.shape[:-1].numel() for part in parts) // BATCH


def image_token(model: PreTrainedModel) -> int | None:
    """The token that stands where an image does."""
    names = ("image_token_id", "image_token_index")
    found = (getattr(model.config, name, None) for name in names)
    return next((int(token) for token in found if token is not None), None)


def _patches(vision: Any, channels: int) -> dict[str, torch.Tensor]:
    """Images cut into patches, one after the other, and the grid each was cut by."""
    rows, columns = (n * int(vision.spatial_merge_size) for n in GRID)
    height, width = _pair(vision.patch_size)
    frames = _pair(vision.temporal_patch_size)[0]
    return {
        "pixel_values": _noise(BATCH * rows * columns, channels * frames * height * width),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * BATCH),
    }


def _takes_sizes(model: PreTrainedModel, vision: Any) -> bool:
    """Whether the part of a model that sees must be told the sizes of the images."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return any(
        part.config is vision and "image_sizes" in inspect.signature(part.forward).parameters
        for part in parts
    )


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(SEED))


def _pair(size: Any) -> tuple[int, int]:
    """A height and a width, of either or of both in a list."""
    both = list(size) if isinstance(size, (list, tuple)) else [size, size]
    return int(both[0]), int(both[-1])
