"""Loads this rank's shard into a transformers model."""

import json
import warnings
from collections import Counter
from hashlib import sha256
from os import close
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from shardkit.errors import ManifestError
from shardkit.runtime.config import build_config
from shardkit.runtime.configs import checked_copy, read_configs
from shardkit.runtime.conversion import find_conversions
from shardkit.runtime.distributed.group import TensorParallelGroup, connect
from shardkit.runtime.distributed.input_check import coordinate_calls
from shardkit.runtime.layers.experts import choose_expert_kernel, expert_kernel_warning
from shardkit.runtime.layers.linear import fit_widths
from shardkit.runtime.materialize import (
    fill_parameters,
    find_tied_placements,
    placements_by_parameter,
    tie_and_initialize,
    zero_tensors,
)
from shardkit.runtime.models.registry import find_model_class
from shardkit.runtime.parallelize import keep_local_units, parallelize_model
from shardkit.runtime.weights import TORCH_DTYPES, read_tensors
from shardkit.shards.manifest import Manifest
from shardkit.shards.manifest_json import read_manifest
from shardkit.shards.reader import open_shard
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts

COMPUTED = ("F64", "F32", "F16", "BF16")  # dtypes that a model computes in


def load(
    folder: str | Path,
    *,
    group: TensorParallelGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    verify: bool = False,
    check_inputs: bool = True,
) -> PreTrainedModel:
    """This rank's part of the model in `folder`, ready for `model(...)` and `model.generate(...)`.

    Under torchrun each rank calls it; alone it loads a folder of tp_size 1.  Every rank's outputs
    are the whole model's.  `dtype` None is the checkpoint's own.  Before the first collective the
    ranks compare their versions, manifests and the shapes and dtypes they will load: with a wrong
    world size, or a missing, foreign or truncated shard, every rank raises the same RanksError.
    With `verify` each rank hashes the very bytes that it loads, and one flipped bit is such an
    error, too.  So is, within `timeouts`, a rank that dies, stalls or never comes: every one that
    is left names it; and a rank that is called with other inputs than the rest, unless
    `check_inputs` is False, which spares each forward and generate one small collective.  Rank 0
    warns of what makes the model slow here.
    """
    group = group or connect(device, timeouts)
    model, slow = load_with_warnings(Path(folder), group, dtype, verify, check_inputs)
    if slow and group.tp_rank == 0:
        warnings.warn(slow, RuntimeWarning, stacklevel=2)
    return model


def load_with_warnings(
    folder: Path,
    group: TensorParallelGroup,
    dtype: torch.dtype | None,
    verify: bool = False,
    check_inputs: bool = False,
) -> tuple[PreTrainedModel, str]:
    """As `load`: the model, and in words, the same on every rank, what makes it slow here."""
    group.set_status("preparing to load")
    manifest, model, unsuited, error = None, None, "", ""
    try:
        manifest = open_rank_shard(folder, group.tp_rank, group.tp_size)
        model = build_on_meta(folder, manifest, dtype)
    except Exception as fault:  # whatever it is, the other ranks must hear of it
        error = str(fault) or type(fault).__name__
    group.all_agree(
        group.software_versions() | (load_signature(manifest, model) if manifest and model else {}),
        error,
    )
    assert manifest is not None
    assert model is not None
    group.set_status("loading")
    try:
        load_into(model, folder, manifest, group, verify)
        unsuited = choose_expert_kernel(model)
    except Exception as fault:
        error = str(fault).split("\n")[0] or type(fault).__name__
    found = group.all_agree({}, error, unsuited)
    coordinate_calls(model, group, check_inputs)
    group.set_status("idle")
    return model, expert_kernel_warning(found) if found else ""


def open_rank_shard(folder: Path, tp_rank: int, tp_size: int) -> Manifest:
    """The manifest, and the proof that this rank's file is there and of this split.

    Raises ManifestError.  Reads the shard's header only.
    """
    manifest = read_manifest(folder)
    if manifest.tp_size != tp_size:
        raise ManifestError(
            f"{folder}: was split for tp_size {manifest.tp_size}, but {tp_size} ranks run it;"
            f" start {manifest.tp_size}, or `shardkit reshard` it for {tp_size}"
        )
    close(open_shard(folder, manifest, tp_rank))
    read_configs(folder, manifest)
    return manifest


def build_on_meta(folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> PreTrainedModel:
    """The whole model, on the meta device.  Raises ShardkitError where none can be made."""
    with checked_copy(folder, manifest) as checked:
        config = build_config(checked, [placed.spec for placed in manifest.plan.placements])
    config.name_or_path = str(folder)
    dtype = dtype or choose_dtype(config, manifest)
    with torch.device("meta"):
        model: PreTrainedModel = resolve_model_class(config)._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def load_signature(manifest: Manifest, model: PreTrainedModel) -> dict[str, str]:
    """What a rank is about to load, in which every rank must be alike."""
    plan = {n: [list(t.shape), str(t.dtype)] for n, t in model.state_dict().items()}
    return {
        "transformers": transformers.__version__,
        "manifest": manifest.sha256,
        "split": manifest.split_id,
        "dtype": str(model.config.dtype).removeprefix("torch."),
        "tensors": sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest(),
    }


def load_into(
    model: PreTrainedModel,
    folder: Path,
    manifest: Manifest,
    group: TensorParallelGroup,
    verify: bool,
) -> None:
    """Make the whole model local, and fill it from this rank's file."""
    dtype = model.config.dtype
    loaded = [n for n, p in manifest.placements.items() if p.style != "ignore"]
    plan = find_conversions(model, loaded)
    placed = placements_by_parameter(model, manifest.placements, plan)
    missing = model.state_dict().keys() - placed.keys()
    tied = find_tied_placements(model, placed, missing)
    parallelize_model(model, manifest, {**placed, **tied}, group)
    wanted = {name for conversion in plan for name, _ in conversion.sources}
    tensors = read_tensors(folder, manifest, group.tp_rank, wanted, verify)
    fill_parameters(model, tensors, plan, group.device, dtype)
    if group.tp_rank:
        zero_tensors(
            model, [name for name, placement in placed.items() if placement.style == "once"]
        )
    tie_and_initialize(model, missing, group.device)
    keep_local_units(model, manifest.plan, placed, group.tp_rank)
    for module in model.modules():
        fit_widths(module)
    if model.can_generate() and "generation_config.json" in manifest.companion_files:
        with checked_copy(folder, manifest) as checked:
            model.generation_config = GenerationConfig.from_pretrained(checked)


def resolve_model_class(config: PreTrainedConfig) -> Any:
    """The model class the config names, of transformers or built in.  Raises ManifestError."""
    for name in config.architectures or ():
        if (found := find_model_class(str(name))) is not None:
            return found
    raise ManifestError(
        f"config.json: architectures {config.architectures} names no model of transformers"
        f" {transformers.__version__}"
    )


def choose_dtype(config: PreTrainedConfig, manifest: Manifest) -> torch.dtype:
    """The config's dtype, or the one most weights are stored in, as from_pretrained has it."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = Counter(p.spec.dtype for p in manifest.plan.placements if p.spec.dtype in COMPUTED)
    return TORCH_DTYPES[stored.most_common(1)[0][0]] if stored else torch.float32
