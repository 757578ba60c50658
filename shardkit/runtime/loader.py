"""Loads this rank's shard into a transformers model."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import close
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from shardkit.dtypes import DTYPES, torch_name
from shardkit.errors import ManifestError, first_line
from shardkit.layout.style import ADD_ONCE, EXPERT
from shardkit.planning import Placement, Rank
from shardkit.recipe.formats import QuantizedWeight
from shardkit.runtime.config import ShardConfigs, build_config, read_shard_configs
from shardkit.runtime.conversion import Conversion, find_conversions, loaded_shapes
from shardkit.runtime.distribute_experts import distribute_experts
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.input_check import coordinate_calls
from shardkit.runtime.distributed.rounded_group import round_sums
from shardkit.runtime.distributed.rounded_sums import check_reduce_dtype
from shardkit.runtime.layers.experts import choose_expert_kernel, describe_slow_experts
from shardkit.runtime.layers.linear import finish_layer
from shardkit.runtime.materialize import (
    fill_parameters,
    find_tied_placements,
    match_conversions,
    tie_and_initialize,
    zero_tensors,
)
from shardkit.runtime.models.registry import find_model_class
from shardkit.runtime.packing import (
    Dequantize,
    Excerpt,
    check_dequantize,
    find_excerpts,
    pack_weights,
)
from shardkit.runtime.parallelize import keep_local_units, parallelize_model
from shardkit.runtime.weights import find_torch_dtype, read_tensors
from shardkit.shards import Manifest, hash_manifest, open_shard, read_manifest
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts


@dataclass(frozen=True, slots=True)
class RankShard:
    """What a rank is to load, its file's header and the small files checked."""

    folder: Path
    manifest: Manifest
    configs: ShardConfigs
    rank: Rank


def load(
    folder: str | Path,
    *,
    group: TensorParallelGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    verify: bool = False,
    check_inputs: bool = True,
    dequantize: Dequantize = "forward",
    reduce_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """This rank's part of a model, ready for `model(...)` and `model.generate(...)`.

    Under torchrun each rank calls it; alone it loads a folder of tp_size 1.

    Args:
        folder: A shard folder.
        group: The ranks, if `connect` has made them already.
        device: Where to run; by default this rank's GPU if there is one, else the CPU.
        dtype: What to run in; by default the checkpoint's own.
        timeouts: How long ranks wait for each other.
        verify: Whether to check each shard's SHA-256 while loading it.
        check_inputs: Whether ranks compare their inputs at each call.
        dequantize: Whether quantized weights are computed in each "forward" or, once, at "load".
        reduce_dtype: torch.bfloat16 to send wider activations' summands in it, which rounds them.

    Returns:
        transformers' own model class, with parallel layers.

    Raises:
        RanksError: On every rank alike: ranks differ, a shard is damaged, or a rank is lost.
        UsageError: `dequantize` or `reduce_dtype` is none of those.

    Example:
        >>> load("llama-tp4")(input_ids).logits.shape  # doctest: +SKIP
        torch.Size([B, T, V])
    """
    check_dequantize(dequantize)
    group = group or connect(device, timeouts)
    how = dtype, verify, check_inputs, dequantize, reduce_dtype
    model, slow = load_with_warnings(Path(folder), group, *how)
    if slow and group.tp_rank == 0:
        warnings.warn(slow, RuntimeWarning, stacklevel=2)
    return model


def load_with_warnings(
    folder: Path,
    group: TensorParallelGroup,
    dtype: torch.dtype | None,
    verify: bool = False,
    check_inputs: bool = False,
    dequantize: Dequantize = "forward",
    reduce_dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, str]:
    """As `load`: the model, and in words, the same on every rank, what makes it slow here."""
    check_reduce_dtype(reduce_dtype)
    group.set_status("preparing to load")
    shard, model, slow_experts, error = None, None, "", ""
    try:
        shard = open_rank_shard(folder, group.tp_rank, group.tp_size)
        model = build_on_meta(shard, dtype)
    except Exception as fault:  # whatever it is, the other ranks must hear of it
        error = str(fault) or type(fault).__name__
    signature = load_signature(shard.manifest, model) if shard and model else {}
    signature |= {"reduce_dtype": torch_name(reduce_dtype)}
    group.all_agree(group.software_versions() | signature, error)
    assert shard is not None
    assert model is not None
    group.set_status("loading")
    try:
        load_into(model, shard, round_sums(group, reduce_dtype), verify, dequantize)
        slow_experts = choose_expert_kernel(model)
    except Exception as fault:
        error = first_line(fault, 1000)
    notes = group.all_agree({}, error, slow_experts)
    coordinate_calls(model, group, check_inputs)
    group.set_status("idle")
    return model, describe_slow_experts(notes) if notes else ""


def open_rank_shard(folder: Path, tp_rank: int, tp_size: int) -> RankShard:
    """The manifest and configs, and the proof that this rank's file is there and of this split.

    Raises ManifestError. Reads the shard's header only.
    """
    manifest = read_manifest(folder)
    if manifest.tp_size != tp_size:
        raise ManifestError(
            f"{folder}: was split for tp_size {manifest.tp_size}, but {tp_size} ranks run it;"
            f" start {manifest.tp_size}, or `shardkit reshard` it for {tp_size}"
        )
    rank = manifest.mesh.rank(tp_rank)
    close(open_shard(folder, manifest, rank))
    return RankShard(folder, manifest, read_shard_configs(folder, manifest), rank)


def build_on_meta(shard: RankShard, dtype: torch.dtype | None) -> PreTrainedModel:
    """The whole model, on the meta device. Raises ShardkitError if none can be made."""
    placements = shard.manifest.plan.weights
    table = shard.configs.config
    if shard.manifest.plan.model_class:
        table = {**table, "architectures": [shard.manifest.plan.model_class]}
    config = build_config(table, [p.spec for p in placements], shard.folder)
    dtype = dtype or choose_dtype(config, shard.manifest)
    with torch.device("meta"):
        model: PreTrainedModel = resolve_model_class(config)._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def load_signature(manifest: Manifest, model: PreTrainedModel) -> dict[str, str]:
    """What a rank is about to load, in which all ranks must be the same."""
    shapes = {n: [list(t.shape), str(t.dtype)] for n, t in model.state_dict().items()}
    return {
        "transformers": transformers.__version__,
        "manifest": hash_manifest(manifest),
        "split": manifest.split_id,
        "dtype": torch_name(model.config.dtype),
        "tensors": sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
    }


@dataclass(frozen=True, slots=True)
class RankParts:
    """What a rank's model is filled from.

    Attributes:
        conversions: How tensors on disk become tensors of the model.
        placements: Of each of the model's tensors that the shards make, what it is made of.
        missing: The model's tensors that no shard makes.
        excerpts: What the rank computes of weights that share blocks with other ranks.
        weights_by_part: For each stored tensor of a quantized weight, the weight.
        stored_names: The tensors of the rank's file that the model is made of.
        count_lengths: How much of each section of a tensor on disk the rank has.
    """

    conversions: list[Conversion]
    placements: dict[str, Placement]
    missing: set[str]
    excerpts: dict[str, Excerpt]
    weights_by_part: dict[str, QuantizedWeight]
    stored_names: set[str]
    count_lengths: Callable[[str], Sequence[int]]


def load_into(
    model: PreTrainedModel,
    shard: RankShard,
    group: TensorParallelGroup,
    verify: bool,
    dequantize: Dequantize,
) -> None:
    """Make the whole model this rank's part of it, and fill it from the rank's file."""
    parts, dtype = prepare_rank(model, shard, group), model.config.dtype
    read = read_tensors(shard.folder, shard.manifest, shard.rank, parts.stored_names, verify)
    stored = ((name, tensor.to(group.device)) for name, tensor in read)
    tensors = pack_weights(stored, parts.weights_by_part, dtype, parts.excerpts)
    is_packed = dequantize == "forward"
    fill_parameters(model, tensors, parts.conversions, dtype, parts.count_lengths, is_packed)
    finish_rank(model, shard, parts, group.device)


def prepare_rank(model: PreTrainedModel, shard: RankShard, group: TensorParallelGroup) -> RankParts:
    """Make the whole model, on the meta device, the one that this rank's tensors fit into."""
    weights, plan, rank = shard.manifest.weights, shard.manifest.plan, shard.rank
    conversions = find_conversions(model, loaded_shapes(weights), plan.wrapper_prefix)
    matched = match_conversions(model, weights, conversions)
    placements = {name: weights[conversion.sources[0][0]] for name, conversion in matched.items()}
    missing = model.state_dict().keys() - placements.keys()
    tied = find_tied_placements(model, placements, missing)
    parallelize_model(model, plan, {**placements, **tied}, group)
    distribute_experts(model, matched, weights, rank, group)
    local = {name for name, p in weights.items() if p.spans(rank)}
    conversions = [c for each in conversions if (c := each.select_sources(local)).sources]
    names = {name for conversion in conversions for name, _ in conversion.sources}
    by_part = {
        part.name: weight
        for weight in plan.grouping.weights.values()
        if weight.name in names
        for _, part in weight.operands
    }

    def count_lengths(name: str) -> Sequence[int]:
        placement = weights[name]
        return () if placement.style is EXPERT else placement.section_lengths(rank)

    stored = names | by_part.keys()
    excerpts = find_excerpts(plan, rank)
    return RankParts(conversions, placements, missing, excerpts, by_part, stored, count_lengths)


def finish_rank(
    model: PreTrainedModel, shard: RankShard, parts: RankParts, device: torch.device
) -> None:
    """Once the model is filled: make what no shard stores, and keep what is this rank's."""
    if not shard.rank.is_first:
        zero_tensors(model, list_added_once(parts))
    tie_and_initialize(model, parts.missing, device)
    keep_local_units(model, shard.manifest.plan, parts.placements, shard.rank)
    for module in model.modules():
        finish_layer(module)
    if model.can_generate() and shard.configs.generation is not None:
        model.generation_config = GenerationConfig.from_dict(shard.configs.generation)


def list_added_once(parts: RankParts) -> list[str]:
    """The model's tensors that only rank 0 adds; they are zero on the others."""
    return [name for name, p in parts.placements.items() if p.style is ADD_ONCE]


def resolve_model_class(config: PreTrainedConfig) -> Any:
    """The model class the config names, of transformers or built in. Raises ManifestError."""
    for name in config.architectures or ():
        if (model_class := find_model_class(str(name))) is not None:
            return model_class
    raise ManifestError(
        f"config.json: architectures {config.architectures} names no model of transformers"
        f" {transformers.__version__}"
    )


def choose_dtype(config: PreTrainedConfig, manifest: Manifest) -> torch.dtype:
    """The config's dtype, or the one most weights are stored in, as from_pretrained has it."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = Counter(p.spec.dtype for p in manifest.plan.weights if DTYPES[p.spec.dtype].is_compute)
    most = stored.most_common(1)
    return (find_torch_dtype(most[0][0]) if most else None) or torch.float32
