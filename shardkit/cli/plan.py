"""`shardkit plan`: what a split would hold and cost, from headers and config alone."""

from collections.abc import Mapping
from typing import Any

import click

from shardkit.checkpoint import Checkpoint
from shardkit.cli.options import ALLOW_PICKLE, JSON, RECIPE, REVISION, TP, open_source
from shardkit.cli.output import format_bytes, format_count, group_ranks, print_json, print_line
from shardkit.cli.report import plan_sizes_to_json, print_plan_sizes
from shardkit.planning.costs import Collectives, KvCache, count_collectives, estimate_kv_cache
from shardkit.planning.plan import Plan, make_plan
from shardkit.planning.summary import (
    TensorGroup,
    count_total_bytes,
    find_blocking_tensor,
    group_by_layout,
)
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.recipe import Recipe

STYLES = {
    "vocab": "Vocab-parallel",
    "column": "Column-parallel",
    "row": "Row-parallel",
    "norm": "Norms over a divided width, one small all-reduce each",
    "gather": "Run whole on gathered inputs, one all-gather each",
    "once": "Replicated, but added by rank 0 alone",
    "replicate": "Replicated",
    "ignore": "Kept on rank 0 for a merge, never loaded",
}


@click.command()
@click.argument("source")
@TP
@RECIPE
@REVISION
@ALLOW_PICKLE
@JSON
def plan(
    source: str,
    tp_size: int,
    recipe: str | None,
    revision: str | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Show what a split would hold and cost.

    SOURCE is a folder of safetensors files with its config.json, or a Hub id such as org/name.
    Only headers and the config are read, so a model of any size takes about a second.

    \b
    Example:
      shardkit plan models/llama --tp 8
      shardkit plan models/llama --tp 8 --json
    """
    with open_source(source, revision, allow_pickle) as checkpoint:
        found = find_recipe(checkpoint.config, recipe)
        made = make_plan(checkpoint.specs(), found, checkpoint.config, tp_size)
    if as_json:
        print_json(plan_json(checkpoint, found, made))
    else:
        _say_plan(checkpoint, found, made)


def plan_json(checkpoint: Checkpoint, recipe: Recipe, made: Plan) -> dict[str, Any]:
    """The whole plan as JSON values: bytes are exact integers, one entry per rank."""
    return {
        "source": checkpoint.name,
        "revision": checkpoint.revision,
        "model_type": checkpoint.model_type,
        "recipe": recipe.name,
        **plan_sizes_to_json(made),
        "groups": [_group_json(group) for group in group_by_layout(made)],
        "kv_cache": _kv_cache_json(made, checkpoint.config),
        "collectives": _collectives_json(count_collectives(made, checkpoint.config)),
        "possible_tp": {
            "smallest": 1,
            "largest": made.max_tp_size,
            "blocked_by": find_blocking_tensor(made),
        },
    }


def _group_json(group: TensorGroup) -> dict[str, Any]:
    spec = group.example.spec
    return {
        "tensors": group.pattern,
        "count": group.count,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "style": group.example.style,
        "dim": group.example.dim,
        "fate": group.treatment,
        "local_shapes": [list(shard.shape) if shard else None for shard in group.shards],
        "rank_bytes": list(group.rank_bytes),
    }


def _kv_cache_json(made: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    cache = estimate_kv_cache(made, config)
    if isinstance(cache, str):
        return {"bytes_per_token": None, "reason": cache}
    return {
        "bytes_per_token": sum(cache.rank_bytes),
        "bytes_per_token_by_rank": list(cache.rank_bytes),
        "layers": cache.layers,
        "head_dim": cache.head_dim,
        "dtype": cache.dtype,
        "kv_heads_by_rank": list(cache.kv_heads),
    }


def _collectives_json(found: Collectives) -> dict[str, Any]:
    return {
        "all_reduces": found.all_reduces,
        "all_gathers": found.all_gathers,
        "row_parallel": found.row_parallel,
        "expert_stacks": found.expert_stacks,
        "embedding": found.embedding,
        "output": found.output,
        "output_is_tied": found.tied,
        "encoder_all_reduces": found.encoder,
    }


def _say_plan(checkpoint: Checkpoint, recipe: Recipe, made: Plan) -> None:
    count, total = (
        format_count(len(made.placements), "tensor"),
        format_bytes(count_total_bytes(made)),
    )
    print_line(
        f"{checkpoint.name}: {checkpoint.model_type}, recipe {recipe.name}, {count}, {total}"
    )
    print_line(
        f"Over {format_count(made.tp_size, 'rank')}, each one's file and its weights in memory:"
    )
    print_plan_sizes(made)
    _say_kv_cache(estimate_kv_cache(made, checkpoint.config))
    print_line(
        f"Collectives  {_collectives_text(count_collectives(made, checkpoint.config), made.tp_size)}"
    )
    blocked = find_blocking_tensor(made)
    why = f"; {blocked} divides no further" if blocked else ""
    print_line(f"Possible     tp_size 1 to {made.max_tp_size}{why}")
    parts = group_by_layout(made)
    for style, title in STYLES.items():
        if same := [group for group in parts if group.example.style == style]:
            print_line()
            print_line(title)
            for group in same:
                print_line(f"  {group.pattern}  {_fate_text(group)}")


def _say_kv_cache(cache: KvCache | str) -> None:
    if isinstance(cache, str):
        print_line(f"KV cache     {cache}")
        return
    each = ", ".join(f"{ranks}: {nbytes:,}" for ranks, nbytes in group_ranks(cache.rank_bytes))
    heads = ", ".join(
        f"{format_count(count, 'kv head')} on {ranks}"
        for ranks, count in group_ranks(cache.kv_heads)
    )
    print_line(f"KV cache     {sum(cache.rank_bytes):,} bytes per token ({each})")
    print_line(
        f"             {cache.layers} layers, {heads}, head_dim {cache.head_dim}, {cache.dtype}"
    )


def _collectives_text(found: Collectives, tp_size: int) -> str:
    if tp_size == 1:
        return "none over one rank"
    parts = [format_count(found.row_parallel, "row-parallel weight")]
    if found.expert_stacks:
        parts.append(format_count(found.expert_stacks, "stack") + " of experts")
    if found.embedding:
        parts.append("the vocab-parallel embedding")
    text = f"{format_count(found.all_reduces, 'all-reduce')} per token ({', '.join(parts)})"
    if found.all_gathers:
        tied = ", tied to the embedding" if found.tied else ""
        text += (
            f", {format_count(found.all_gathers, 'all-gather')} (the vocab-parallel output{tied})"
        )
    if found.encoder:
        text += f"; {format_count(found.encoder, 'all-reduce')} per prompt in the encoder"
    return text


def _fate_text(group: TensorGroup) -> str:
    shape, dim = list(group.example.spec.shape), group.example.dim
    if dim is None:
        once = ", added once after the sum" if group.example.style == "row" else ""
        return f"{shape} {group.treatment}{once}"
    held = [shard.shape[dim] for shard in group.shards if shard]
    low, high = min(held), max(held)
    local = [str(n) for n in shape]
    local[dim] = str(low) if low == high else f"{low}..{high}"
    fate = "" if group.treatment == "split" else f", {group.treatment}"
    return f"dim {dim}  {shape} -> [{', '.join(local)}] each{fate}"
