"""Proves quantized formats: split, merged, resharded and run, beside an independent reference.

Faults are injected into a rank's shard as a wrong cut or a wrong reader would make them, and level
3 must find each.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from shardkit.authoring.expert_faults import plan_whole_experts
from shardkit.authoring.format_samples import FormatSample, make_quantized
from shardkit.authoring.masked_sum import WEIGHT_FILE
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample
from shardkit.checkpoint import Checkpoint
from shardkit.convert import (
    merge_destination,
    merge_shards,
    reshard_shards,
    shard_destination,
    split_checkpoint,
)
from shardkit.errors import LayoutError, RecipeError, ShardkitError
from shardkit.planning import plan_for
from shardkit.recipe import compose_recipe, find_recipe
from shardkit.recipe.formats import QuantizedWeight, StoredPart
from shardkit.shards import Manifest, ShardedCheckpoint
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics

TP_SIZES = (2, 3, 4)
EXPERT_TP_SIZES = (2, 3)  # with whole experts
FAULT_TP_SIZE = 2

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FormatProof:
    """What became of one model in one format over one number of ranks.

    Attributes:
        model: The model's name.
        format: The format sample's name.
        tp_size: The number of ranks.
        expert_parallel: Whether each has whole experts.
        verdict: `proven`; or `refused`, before anything is written; or `failed`.
        detail: The largest error beside what is allowed, the refusal, or the fault.
    """

    model: str
    format: str
    tp_size: int
    expert_parallel: bool
    verdict: str
    detail: str


@dataclass(frozen=True)
class FaultResult:
    """A injected fault, and what level 3 said of it; empty if it found nothing."""

    format: str
    fault: str
    finding: str


def prove_format(
    model: Sample,
    sample: FormatSample,
    pool: RankPool,
    scratch: Path,
    tp_sizes: Sequence[int] = TP_SIZES,
    expert_tp_sizes: Sequence[int] = EXPERT_TP_SIZES,
) -> Iterator[FormatProof]:
    """Prove a model in a format over each of these numbers of ranks, without whole experts first.

    Args:
        model: The model, of 16 bits.
        sample: The format.
        pool: The ranks.
        scratch: An empty folder.
        tp_sizes: The numbers of ranks.
        expert_tp_sizes: Those over which a mixture has whole experts on each.
    """
    source = make_quantized(model, sample, scratch / "source")
    with Checkpoint(source) as checkpoint:
        if not plan_for(checkpoint, 1)[1].grouping.weights:
            return  # the format is of nothing that the model has
        recipe, config = find_recipe(checkpoint.config), checkpoint.config
    yield from _prove_sizes(model, sample, pool, scratch, tp_sizes, False)
    if plan_whole_experts(source, compose_recipe(recipe, config), 1) is not None:
        yield from _prove_sizes(model, sample, pool, scratch, expert_tp_sizes, True)


def _prove_sizes(
    model: Sample,
    sample: FormatSample,
    pool: RankPool,
    scratch: Path,
    tp_sizes: Sequence[int],
    expert_parallel: bool,
) -> Iterator[FormatProof]:
    earlier: Path | None = None
    source, layouts = scratch / "source", scratch / ("ep" if expert_parallel else "tp")
    layouts.mkdir()
    for size in tp_sizes:
        shards, stated = layouts / str(size), (model.name, sample.name, size, expert_parallel)
        try:
            manifest = _split(source, shards, size, expert_parallel)
        except (LayoutError, RecipeError) as refusal:
            yield FormatProof(*stated, "refused", str(refusal))
            continue
        try:
            detail, fault = _prove_shards(source, shards, manifest, earlier, pool, layouts)
        except ShardkitError as error:
            detail, fault = "", str(error)
        earlier = shards
        verdict = "failed" if fault else "proven"
        yield FormatProof(*stated, verdict, fault or detail)


def _split(source: Path, shards: Path, size: int, expert_parallel: bool = False) -> Manifest:
    with Checkpoint(source) as checkpoint:
        recipe, plan = plan_for(checkpoint, size, None, expert_parallel)
        return split_checkpoint(checkpoint, plan, recipe, shard_destination(shards))


def _prove_shards(
    source: Path,
    shards: Path,
    manifest: Manifest,
    earlier: Path | None,
    pool: RankPool,
    scratch: Path,
) -> tuple[str, str]:
    """The numbers of a proof, and what failed; empty if nothing did."""
    size = manifest.tp_size
    if earlier is not None:
        with ShardedCheckpoint(earlier) as other:
            reshard_shards(other, size, shard_destination(scratch / f"resharded{size}"))
        for rank_file in manifest.ranks:
            resharded = scratch / f"resharded{size}" / rank_file.name
            if resharded.read_bytes() != (shards / rank_file.name).read_bytes():
                return "", f"a reshard makes another {rank_file.name} than a split"
    with ShardedCheckpoint(shards) as opened:
        merged = scratch / f"merged{size}"
        merge_shards(opened, merge_destination(opened.manifest, merged))
    if (merged / WEIGHT_FILE).read_bytes() != (source / WEIGHT_FILE).read_bytes():
        return "", "the merged file is not the source's"
    check = check_numerics(shards, manifest, source, ShardedModel(pool.of(size)))
    return check.summary, "; ".join(check.faults)


def inject_faults(
    model: Sample, sample: FormatSample, pool: RankPool, scratch: Path
) -> Iterator[FaultResult]:
    """Inject each fault that a format can have in the last rank's shard, and run level 3."""
    source = make_quantized(model, sample, scratch / "source")
    manifest = _split(source, scratch / "shards", FAULT_TP_SIZE)
    path = scratch / "shards" / manifest.ranks[-1].name
    intact, sharded = path.read_bytes(), ShardedModel(pool.of(FAULT_TP_SIZE))
    weights = [w for w in manifest.plan.grouping.weights.values() if _is_divided(w, manifest)]
    for name, inject in FAULTS.items():
        with safe_open(path, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        damaged = {}
        for weight in weights:
            damaged = inject(weight, tensors)
            if damaged:
                break
        if not damaged:
            continue
        path.write_bytes(_replace_tensors(intact, damaged))
        try:
            check = check_numerics(scratch / "shards", manifest, source, sharded)
            yield FaultResult(sample.name, name, "; ".join(check.faults))
        finally:
            path.write_bytes(intact)


def _replace_tensors(data: bytes, tensors: Tensors) -> bytes:
    """A safetensors file with other bytes in the place of some of its tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, changed = json.loads(data[8:start]), bytearray(data)
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        changed[start + begin : start + end] = raw
    return bytes(changed)


def _is_divided(weight: QuantizedWeight, manifest: Manifest) -> bool:
    return manifest.placements[weight.codes.name].dim is not None


def _rotate_scale(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    """Each scale where its neighbor's should be."""
    part = _find_part(weight, weight.scheme.format.scales[0])
    if part is None or tensors[part].numel() < 2:
        return {}
    value = tensors[part]
    raw = value.view(torch.uint8) if value.element_size() == 1 else value
    dim = max(range(raw.ndim), key=lambda at: raw.shape[at])
    return _changed(part, value, raw.roll(1, dim).view(value.dtype))


def _take_other_scale(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    """The scale of another weight of the same shape, as of up in the place of gate."""
    scale = weight.scheme.format.scales[0]
    part = _find_part(weight, scale)
    if part is None:
        return {}
    alike = [
        other
        for name, other in tensors.items()
        if name != part and name.endswith(scale.suffix) and other.shape == tensors[part].shape
    ]
    swaps = (_changed(part, tensors[part], other) for other in alike)
    return next(filter(None, swaps), {})


def _rotate_codes(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    """The codes as another rank's cut would begin."""
    name = weight.codes.name
    raw = tensors[name].view(torch.uint8) if tensors[name].element_size() == 1 else tensors[name]
    return _changed(name, tensors[name], raw.roll(1, 0).view(tensors[name].dtype))


def _swap_nibbles(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    """Two packed numbers in each other's place."""
    codes = weight.scheme.format.codes
    if weight.scheme.count_packed(codes, weight.codes.dtype) < 2:
        return {}
    name = weight.codes.name
    pairs = tensors[name].contiguous().view(torch.uint8)
    swapped = ((pairs & 15) << 4) | (pairs >> 4)
    return _changed(name, tensors[name], swapped.view(tensors[name].dtype))


def _shift_zero_point(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    part = _find_part(weight, weight.scheme.format.zero_point)
    return {} if part is None else _changed(part, tensors[part], tensors[part] + 1)


def _number_groups_locally(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    """The groups of a rank's inputs counted from 0, as if scales were cut."""
    part = _find_part(weight, weight.scheme.format.group_index)
    if part is None:
        return {}
    index = tensors[part]
    return _changed(part, index, (index.argsort() // max(len(index) // 2, 1)).to(index.dtype))


def _drop_total_scale(weight: QuantizedWeight, tensors: Tensors) -> Tensors:
    """A weight's own scale as 1."""
    totals = [s for s in weight.scheme.format.scales if all(a.per == "all" for a in s.axes)]
    part = _find_part(weight, totals[0]) if totals else None
    return {} if part is None else _changed(part, tensors[part], torch.ones_like(tensors[part]))


def _changed(name: str, before: torch.Tensor, after: torch.Tensor) -> Tensors:
    """The tensor if it is another than before."""
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (before, after)]
    return {} if torch.equal(*raw) else {name: after.contiguous()}


def _find_part(weight: QuantizedWeight, tensor: StoredPart | None) -> str | None:
    return next((part.name for each, part in weight.parts if each is tensor), None)


FAULTS: Mapping[str, Callable[[QuantizedWeight, Tensors], Tensors]] = {
    "scale rotated": _rotate_scale,
    "scale of another weight": _take_other_scale,
    "codes rotated": _rotate_codes,
    "packed numbers swapped": _swap_nibbles,
    "zero point shifted by one": _shift_zero_point,
    "groups numbered from 0": _number_groups_locally,
    "scale of the weight dropped": _drop_total_scale,
}
