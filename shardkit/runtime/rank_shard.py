"""What a rank is to load: its file, checked as far as its header, and the model it is a part of."""

import json
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from os import close
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from shardkit.dtypes import DTYPES, torch_name
from shardkit.errors import ManifestError
from shardkit.planning import Rank
from shardkit.runtime.config import ShardConfigs, build_config, read_shard_configs
from shardkit.runtime.models.registry import find_model_class
from shardkit.runtime.weights import find_torch_dtype
from shardkit.shards import Manifest, hash_manifest, open_shard, read_manifest


@dataclass(frozen=True, slots=True)
class RankShard:
    """What a rank is to load, its file's header and the small files checked."""

    folder: Path
    manifest: Manifest
    configs: ShardConfigs
    rank: Rank


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
