"""The tensors of a plan, one line for those of one layout."""

from typing import Any

from shardkit.cli.output import print_line
from shardkit.layout import STYLES
from shardkit.planning import PlanSummary, TensorGroup


def print_groups(summary: PlanSummary) -> None:
    """Print the tensors style by style."""
    for style in STYLES.values():
        if groups := [group for group in summary.groups if group.example.style is style]:
            print_line()
            print_line(style.title)
            for group in groups:
                print_line(f"  {group.pattern}  {_describe_group(group)}")


def group_to_json(group: TensorGroup) -> dict[str, Any]:
    """Tensors of one layout as JSON values."""
    spec = group.example.spec
    return {
        "tensors": group.pattern,
        "count": group.count,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "style": group.example.style.name,
        "dim": group.example.dim,
        "treatment": group.treatment,
        "local_shapes": [list(shard.shape) if shard else None for shard in group.shards],
        "rank_bytes": list(group.rank_bytes),
    }


def _describe_group(group: TensorGroup) -> str:
    shape, dim = list(group.example.spec.shape), group.example.dim
    unloaded = "" if group.example.in_model else ", not loaded"
    if dim is None:
        if group.example.expert is not None:
            counts = sorted({*group.counts})
            return f"{shape} {group.treatment}, {'..'.join(map(str, counts))} on each rank"
        is_bias = group.example.style.is_linear and group.example.style.is_added_once
        return f"{shape} {group.treatment}" + (", added once after the sum" if is_bias else "")
    lengths = [shard.shape[dim] for shard in group.shards if shard]
    low, high = min(lengths), max(lengths)
    local = [str(n) for n in shape]
    local[dim] = str(low) if low == high else f"{low}..{high}"
    treatment = "" if group.treatment == "split" else f", {group.treatment}"
    return f"dim {dim}  {shape} -> [{', '.join(local)}] each{treatment}{unloaded}"
