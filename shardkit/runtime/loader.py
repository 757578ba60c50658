"""Loads this rank's shard into a transformers model."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from shardkit.dtypes import torch_name
from shardkit.errors import first_line
from shardkit.layout.style import ADD_ONCE, EXPERT
from shardkit.planning import Placement
from shardkit.recipe.formats import QuantizedWeight
from shardkit.runtime.compile_decoding import check_compilable, compile_decoding
from shardkit.runtime.conversion import Conversion, find_conversions, loaded_shapes
from shardkit.runtime.distribute_experts import distribute_experts
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.input_check import coordinate_calls
from shardkit.runtime.distributed.rounded_group import round_sums
from shardkit.runtime.join_sums import join_sums
from shardkit.runtime.layers.experts import choose_expert_kernel, describe_slow_experts
from shardkit.runtime.layers.linear import finish_layer
from shardkit.runtime.load_options import LoadOptions
from shardkit.runtime.materialize import (
    fill_parameters,
    find_tied_placements,
    match_conversions,
    tie_and_initialize,
    zero_tensors,
)
from shardkit.runtime.packing import (
    Dequantize,
    Excerpt,
    find_excerpts,
    pack_weights,
)
from shardkit.runtime.parallelize import keep_local_units, parallelize_model
from shardkit.runtime.rank_shard import RankShard, build_on_meta, load_signature, open_rank_shard
from shardkit.runtime.weights import map_tensors, read_tensors
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts


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
    mmap: bool = False,
    compile: bool = False,
    reduce_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """This rank's part of a model: transformers' own class, with parallel layers.

    Under torchrun each rank calls it; alone it loads a folder of tp_size 1.

    Args:
        folder: A shard folder.
        group: The ranks, if `connect` has made them already.
        device: Where to run; by default this rank's GPU if there is one, else the CPU.
        dtype: What to run in; by default the checkpoint's own.
        timeouts: How long ranks wait for each other.
        verify: Whether to check each shard's SHA-256 while loading it.
        check_inputs: Whether ranks compare their inputs at each call, unless your server does.
        dequantize: When quantized weights are computed: in each "forward", or once, at "load".
        mmap: Whether weights stay in the mapped file, for who trusts that nothing changes it.
        compile: Whether `generate` decodes by compiled steps over a cache of fixed size.
        reduce_dtype: torch.bfloat16 to send sums of wider activations in it, which rounds them.

    Raises:
        RanksError: On every rank alike: ranks differ, or one cannot load its shard, dies or stalls.
        UsageError: If an option is not what it can be; `LoadOptions` has them.

    Example:
        >>> load("llama-tp4")(input_ids).logits.shape  # doctest: +SKIP
        torch.Size([B, T, V])
    """
    options = LoadOptions(dtype, verify, dequantize, mmap, compile, reduce_dtype)
    group = group or connect(device, timeouts)
    model, slow = load_with_warnings(Path(folder), group, options, check_inputs)
    if slow and group.tp_rank == 0:
        warnings.warn(slow, RuntimeWarning, stacklevel=2)
    return model


def load_with_warnings(
    folder: Path,
    group: TensorParallelGroup,
    options: LoadOptions,
    check_inputs: bool = False,
) -> tuple[PreTrainedModel, str]:
    """As `load`: the model, and in words, the same on every rank, what makes it slow here."""
    group.set_status("preparing to load")
    shard, model, slow_experts, error = None, None, "", ""
    try:
        shard = open_rank_shard(folder, group.tp_rank, group.tp_size)
        model = build_on_meta(shard, options.dtype)
        if options.compile:
            quantized = shard.manifest.plan.grouping.weights
            check_compilable(model, bool(quantized) and options.dequantize == "forward")
    except Exception as fault:  # whatever it is, the other ranks must hear of it
        error = str(fault) or type(fault).__name__
    signature = load_signature(shard.manifest, model) if shard and model else {}
    signature |= {"reduce_dtype": torch_name(options.reduce_dtype)}
    group.all_agree(group.software_versions() | signature, error)
    assert shard is not None
    assert model is not None
    group.set_status("loading")
    try:
        load_into(model, shard, round_sums(group, options.reduce_dtype), options)
        slow_experts = choose_expert_kernel(model)
    except Exception as fault:
        error = first_line(fault, 1000)
    notes = group.all_agree({}, error, slow_experts)
    coordinate_calls(model, group, check_inputs)
    if options.compile:
        compile_decoding(model, group)
    group.set_status("idle")
    return model, describe_slow_experts(notes) if notes else ""


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
    options: LoadOptions,
) -> None:
    """Make the whole model this rank's part of it, and fill it from the rank's file."""
    parts, dtype = prepare_rank(model, shard, group), model.config.dtype
    file = shard.folder, shard.manifest, shard.rank, parts.stored_names
    read = map_tensors(*file) if options.mmap else read_tensors(*file, options.verify)
    stored = ((name, tensor.to(group.device)) for name, tensor in read)
    tensors = pack_weights(stored, parts.weights_by_part, dtype, parts.excerpts)
    is_packed = options.dequantize == "forward"
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
    join_sums(model, plan, group)
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
