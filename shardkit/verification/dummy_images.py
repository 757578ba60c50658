"""Images that any model of a kind can see, from its config alone, the same every time.

Shapes: B batch (always 2).
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

BATCH = 2
IMAGE_SEED = 21
GRID = (4, 6)  # merged patches of an image of free size: more than one window of attention
MERGE_FIELDS = ("spatial_merge_size", "merge_kernel_size", "merge_size")
CHANNEL_FIELDS = ("num_channels", "in_channels", "in_chans")
COLORS = 3  # of an image whose config does not state its channels


def make_images(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two images as the model needs them: `[B, channels, height, width]`, or patches and a grid.

    Empty for a model without vision.
    """
    arguments = inspect.signature(model.forward).parameters
    if "pixel_values" not in arguments:
        return {}
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or config
    stated = (int(getattr(vision, name)) for name in CHANNEL_FIELDS if hasattr(vision, name))
    channels = next(stated, COLORS)
    if "image_grid_thw" in arguments:
        return _make_patches(config, vision, channels)
    if "spatial_shapes" in arguments:
        return _make_padded_patches(vision, channels)
    if tiles := getattr(config, "image_grid_pinpoints", None):
        return _make_tiles(tiles[0], int(vision.image_size), channels)
    if needs_sizes := _needs_image_sizes(model, vision):
        merge = int(getattr(config, "spatial_merge_size", None) or 1)
        height, width = (n * merge * _to_pair(vision.patch_size)[0] for n in GRID)
    else:
        height, width = _to_pair(vision.image_size)
    images = {"pixel_values": _make_noise(BATCH, channels, height, width)}
    if needs_sizes:
        images["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    if "pixel_attention_mask" in arguments:  # several images for each text: one here
        images["pixel_values"] = images["pixel_values"].unsqueeze(1)
        images["pixel_attention_mask"] = torch.ones(BATCH, 1, height, width, dtype=torch.bool)
    return images


def _make_patches(config: Any, vision: Any, channels: int) -> dict[str, torch.Tensor]:
    """Images cut into patches `[patches, values]`, and the grid of each, `[B, 3]`.

    Some models read patches as small images, `[patches, channels, height, width]`.
    """
    merge = next(
        getattr(owner, name)
        for owner in (vision, config)
        for name in MERGE_FIELDS
        if getattr(owner, name, None)
    )
    rows, columns = (n * _to_pair(merge)[0] for n in GRID)
    height, width = _to_pair(vision.patch_size)
    frames = _to_pair(getattr(vision, "temporal_patch_size", 1))[0]
    shape = [channels * frames * height * width]
    if hasattr(vision, "merge_kernel_size"):
        shape = [channels, height, width]
    return {
        "pixel_values": _make_noise(BATCH * rows * columns, *shape),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * BATCH),
    }


def _make_padded_patches(vision: Any, channels: int) -> dict[str, torch.Tensor]:
    """Images cut into patches `[B, patches, values]`, which of them are there, and their grid."""
    rows, columns = GRID
    height, width = _to_pair(vision.patch_size)
    return {
        "pixel_values": _make_noise(BATCH, rows * columns, channels * height * width),
        "pixel_attention_mask": torch.ones(BATCH, rows * columns, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[rows, columns]] * BATCH),
    }


def _make_tiles(sides: Sequence[int], size: int, channels: int) -> dict[str, torch.Tensor]:
    """Images cut into tiles after the whole image, `[B, tiles, channels, size, size]`."""
    tiles = 1 + math.prod(side // size for side in sides)
    return {
        "pixel_values": _make_noise(BATCH, tiles, channels, size, size),
        "image_sizes": torch.tensor([list(sides)] * BATCH),
    }


def _needs_image_sizes(model: PreTrainedModel, vision: Any) -> bool:
    """Whether the vision tower of a model needs the sizes of the images."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return any(
        part.config is vision and "image_sizes" in inspect.signature(part.forward).parameters
        for part in parts
    )


def _make_noise(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(IMAGE_SEED)
    return torch.randn(shape, dtype=torch.float32, generator=generator)


def _to_pair(size: Any) -> tuple[int, int]:
    """A height and a width, from one number or from a list of both."""
    pair = list(size) if isinstance(size, (list, tuple)) else [size, size]
    return int(pair[0]), int(pair[-1])
