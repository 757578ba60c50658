"""How much memory a verification takes, from the manifest and the model's modules: upper bounds."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shardkit.dtypes import DTYPES
from shardkit.errors import ShardkitError
from shardkit.planning import KvCache, Placement, estimate_kv_cache
from shardkit.runtime.config import read_shard_configs
from shardkit.runtime.conversion import find_conversions, loaded_shapes
from shardkit.runtime.materialize import match_conversions
from shardkit.runtime.rank_shard import RankShard, build_on_meta
from shardkit.shards import Manifest
from shardkit.verification.blocks import list_model_blocks
from shardkit.verification.kept_outputs import MAX_KEPT
from shardkit.verification.streamed_weights import SMALL

PROCESS_BYTES = 500_000_000  # of a process that has imported torch and transformers, and used them
WIDEST = 8  # bytes of a value of the reference, which is float64
MIDDLE = 4  # of one in float32, in which 16-bit models are run, too
DEQUANTIZED = 4  # bytes of a value of a quantized weight of the source, which is float32
SPARE = 1.1  # of what is counted: what the allocator keeps, and what a multiplication packs
MODULE_BYTES = 4000  # of a module's objects, those of its parameters included
UNSHARDED = 8  # models besides the ranks': in three dtypes, as run and as built, and two of ranks
IN_USE = 6  # outputs of a block that a rank has in use at once, while it waits for the others
THREAD_BYTES = 1_000_000  # of a rank's thread, and those that torch computes with for it
TOKENS = 56  # of all texts, 2 of 24 and two steps, with some to spare; images may fill more
NUMBER = re.compile(r"\.\d+(?=\.|$)")


def estimate_real_ranks(manifest: Manifest, dtype: str | None) -> int:
    """Bytes that real ranks take with the unsharded model, whole, in its own and a wider dtype.

    Args:
        manifest: The split.
        dtype: What to compute in; None means the dtype that most weights are stored in.
    """
    specs = [p.spec for p in manifest.plan.weights]
    count = sum(math.prod(spec.shape) for spec in specs)
    width = max((DTYPES[spec.dtype].bits for spec in specs), default=32) // 8
    if dtype is not None:
        width = next(d.bits for d in DTYPES.values() if d.torch_name == dtype) // 8
    wider = 8 if width >= 4 else 4
    return count * (wider + 2 * width) + (manifest.tp_size + 1) * PROCESS_BYTES


def estimate_turns(folder: Path, manifest: Manifest) -> int:
    """Bytes that ranks in turns take: the largest block as it is stored, and in float64 the largest
    module of it, whose weights come and go alone. Of what blocks output, a few are kept for a
    pass, the rest on disk; and the keys and values of the unsharded models. Each rank has its
    modules' own objects, and what it computes with.

    Of a model that cannot be built, which the check will say, it is as much as that needs.
    """
    configs = read_shard_configs(folder, manifest)
    try:
        whole = build_on_meta(RankShard(folder, manifest, configs, manifest.mesh.rank(0)), None)
        quantized = {weight.name for weight in manifest.plan.grouping.weights.values()}
        weights = manifest.weights, manifest.plan.wrapper_prefix
        largest = max(count_block_bytes(whole, *weights, quantized).values(), default=0)
    except ShardkitError:
        return PROCESS_BYTES
    kept = min(count_output_bytes(manifest), MAX_KEPT) + count_kept_keys(manifest, configs.config)
    objects = len([*whole.modules()]) * MODULE_BYTES * (manifest.tp_size + UNSHARDED)
    return PROCESS_BYTES + math.ceil(SPARE * largest) + kept + objects + count_rank_bytes(manifest)


def count_block_bytes(
    whole: PreTrainedModel,
    placements: Mapping[str, Placement],
    wrapper_prefix: str,
    quantized: Collection[str],
) -> dict[str, int]:
    """The most bytes of weights that there are at once while a block runs, by block.

    The stored tensors of a block are kept until every unsharded model has had them. A module's in
    float64 go when it has run, unless they are small; a tensor that is made of several is there
    twice before that.

    Args:
        whole: The model on the meta device.
        placements: The tensors on disk, by name, a quantized weight as one.
        wrapper_prefix: What training wrappers put before each of the names.
        quantized: Those of them that are quantized.
    """
    blocks = sorted(list_model_blocks(whole), key=len, reverse=True)
    shapes = loaded_shapes(placements)
    conversions = find_conversions(whole, shapes, wrapper_prefix)
    stored: dict[str, int] = defaultdict(int)
    modules: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    counted: set[int] = set()
    for name, conversion in match_conversions(whole, placements, conversions).items():
        block = _find_block(name, blocks)
        count = whole.get_parameter_or_buffer(name).numel()
        specs = [placements[source].spec for source, _ in conversion.sources]
        widths = [DEQUANTIZED if s.name in quantized else DTYPES[s.dtype].bits / 8 for s in specs]
        if id(conversion) not in counted:
            counted.add(id(conversion))
            sizes = (math.prod(s.shape) * w for s, w in zip(specs, widths, strict=True))
            stored[block] += math.ceil(sum(sizes))
        is_made = conversion.converter is not None
        width = WIDEST + (max(widths) if is_made else 0)
        modules[block][name.rpartition(".")[0]] += math.ceil(count * width)
    outside = stored[""] + sum(modules[""].values())
    return {
        block: stored[block] + _count_module_bytes([*modules[block].values()]) + outside
        for block in blocks
    }


def _count_module_bytes(modules: Sequence[int]) -> int:
    """Of a block's modules: the small ones stay until it ends, the large ones come and go."""
    small = sum(nbytes for nbytes in modules if nbytes <= 2 * SMALL)
    return small + max((nbytes for nbytes in modules if nbytes > 2 * SMALL), default=0)


def _find_block(tensor: str, blocks: Sequence[str]) -> str:
    return next((block for block in blocks if tensor.startswith(f"{block}.")), "")


def count_output_bytes(manifest: Manifest) -> int:
    """Bytes of what all blocks of the reference output in one pass."""
    return TOKENS * WIDEST * sum(list_output_widths(manifest).values())


def count_rank_bytes(manifest: Manifest) -> int:
    """Bytes of what every rank computes with in a block, and of their threads."""
    widths = list_output_widths(manifest).items()
    widest = max((width for block, width in widths if NUMBER.search(block)), default=0)
    return manifest.tp_size * (IN_USE * TOKENS * MIDDLE * widest + THREAD_BYTES)


def list_output_widths(manifest: Manifest) -> dict[str, int]:
    """How many features each block outputs, by the widths of biases and norms, and of what is
    outside of layers."""
    outputs: dict[str, int] = {}
    for placement in manifest.plan.weights:
        spec, block = placement.spec, name_block(placement.spec.name)
        if len(spec.shape) == 1 or not NUMBER.search(spec.name):
            outputs[block] = max(outputs.get(block, 0), *spec.shape, 1)
    return outputs


def count_kept_keys(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """Bytes of the keys and values that the unsharded models keep together; 0 if it is unknown."""
    cache = estimate_kv_cache(manifest.plan.with_tp_size(1), config)
    if not isinstance(cache, KvCache):
        return 0
    width = DTYPES[cache.dtype].bits // 8
    every = WIDEST + width + (MIDDLE if width < MIDDLE else 0)
    heads, units = cache.kv_heads[0], manifest.plan.units.values()
    # A manifest does not name the tensors of a unit: heads that share kv heads are counted as them.
    kv_heads = max((u.count or heads for u in units if u.shared_by == heads), default=heads)
    return TOKENS * sum(cache.rank_bytes) * every * kv_heads // (width * heads)


def name_block(tensor: str) -> str:
    """The block that a tensor is of, by its name: to its first number, or else its module.

    Example:
        >>> name_block("model.layers.3.mlp.up_proj.weight"), name_block("lm_head.weight")
        ('model.layers.3', 'lm_head')
    """
    match = NUMBER.search(tensor)
    return tensor[: match.end()] if match else tensor.rpartition(".")[0]
