"""What the tests of running models share: split a folder, and rank processes that serve many."""

from collections.abc import Mapping
from pathlib import Path

import torch

from shardkit.checkpoint import open_checkpoint
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.planning import make_plan
from shardkit.recipe.catalog import find_recipe, find_recipe_folder
from shardkit.recipe.formats import QuantizedWeight
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.recipe import Recipe
from shardkit.runtime.dequantize import store_weight
from shardkit.runtime.packed import compute_tensor, pack_weight
from shardkit.shards.manifest import Manifest


def cut(
    source: Path,
    out: Path,
    tp_size: int,
    recipe: Recipe | None = None,
    expert_parallel: bool = False,
) -> Manifest:
    """Split a checkpoint folder, by its own recipe unless another is given."""
    with open_checkpoint(str(source)) as checkpoint:
        recipe = recipe or find_recipe(checkpoint.config)
        specs, config = checkpoint.specs(), checkpoint.config
        plan = make_plan(specs, recipe, config, tp_size, expert_parallel)
        return split_checkpoint(checkpoint, plan, recipe, shard_destination(out))


def altered(name: str, folder: Path, *changes: tuple[str, str]) -> Recipe:
    """A bundled recipe with text replaced: how a layout fault is planted."""
    text = (find_recipe_folder() / f"{name}.toml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return load_recipe(path)


def dequantize_weight(
    weight: QuantizedWeight, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """A quantized weight of its stored tensors, as the runtime computes it."""
    return compute_tensor(pack_weight(store_weight(weight, tensors), dtype))
