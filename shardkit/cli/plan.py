"""`shardkit plan`: what a split would hold and cost, from headers and config alone."""

from collections.abc import Mapping
from typing import Any

import click

from shardkit.checkpoint import Checkpoint
from shardkit.cli.options import ALLOW_PICKLE, JSON, RECIPE, REVISION, TP, open_source
from shardkit.cli.output import by_rank, plural, say, say_json, size
from shardkit.cli.report import plan_sizes, say_plan_sizes
from shardkit.planning.costs import Collectives, KvCache, collectives, kv_cache
from shardkit.planning.plan import Plan, make_plan
from shardkit.planning.summary import Group, blocking_tensor, groups, total_bytes
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
        say_json(plan_json(checkpoint, found, made))
    else:
        _say_plan(checkpoint, found, made)


def plan_json(checkpoint: Checkpoint, recipe: Recipe, made: Plan) -> dict[str, Any]:
    """The whole plan as JSON values: bytes are exact integers, one entry per rank."""
    return {
        "source": checkpoint.name,
        "revision": checkpoint.revision,
        "model_type": checkpoint.model_type,
        "recipe": recipe.name,
        **plan_sizes(made),
        "groups": [_group_json(group) for group in groups(made)],
        "kv_cache": _kv_cache_json(made, checkpoint.config),
        "collectives": _collectives_json(collectives(made, checkpoint.config)),
        "possible_tp": {
            "smallest": 1,
            "largest": made.max_tp_size,
            "blocked_by": blocking_tensor(made),
        },
    }


def _group_json(group: Group) -> dict[str, Any]:
    spec = group.example.spec
    return {
        "tensors": group.pattern,
        "count": group.count,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "style": group.example.style,
        "dim": group.example.dim,
        "fate": group.fate,
        "local_shapes": [list(shard.shape) if shard else None for shard in group.shards],
        "rank_bytes": list(group.rank_bytes),
    }


def _kv_cache_json(made: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    cache = kv_cache(made, config)
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
    count, total = plural(len(made.placements), "tensor"), size(total_bytes(made))
    say(f"{checkpoint.name}: {checkpoint.model_type}, recipe {recipe.name}, {count}, {total}")
    say(f"Over {plural(made.tp_size, 'rank')}, each one's file and its weights in memory:")
    say_plan_sizes(made)
    _say_kv_cache(kv_cache(made, checkpoint.config))
    say(f"Collectives  {_collectives_text(collectives(made, checkpoint.config), made.tp_size)}")
    blocked = blocking_tensor(made)
    why = f"; {blocked} divides no further" if blocked else ""
    say(f"Possible     tp_size 1 to {made.max_tp_size}{why}")
    parts = groups(made)
    for style, title in STYLES.items():
        if same := [group for group in parts if group.example.style == style]:
            say()
            say(title)
            for group in same:
                say(f"  {group.pattern}  {_fate_text(group)}")


def _say_kv_cache(cache: KvCache | str) -> None:
    if isinstance(cache, str):
        say(f"KV cache     {cache}")
        return
    each = ", ".join(f"{ranks}: {nbytes:,}" for ranks, nbytes in by_rank(cache.rank_bytes))
    heads = ", ".join(
        f"{plural(count, 'kv head')} on {ranks}" for ranks, count in by_rank(cache.kv_heads)
    )
    say(f"KV cache     {sum(cache.rank_bytes):,} bytes per token ({each})")
    say(f"             {cache.layers} layers, {heads}, head_dim {cache.head_dim}, {cache.dtype}")


def _collectives_text(found: Collectives, tp_size: int) -> str:
    if tp_size == 1:
        return "none over one rank"
    parts = [plural(found.row_parallel, "row-parallel weight")]
    if found.expert_stacks:
        parts.append(plural(found.expert_stacks, "stack") + " of experts")
    if found.embedding:
        parts.append("the vocab-parallel embedding")
    text = f"{plural(found.all_reduces, 'all-reduce')} per token ({', '.join(parts)})"
    if found.all_gathers:
        tied = ", tied to the embedding" if found.tied else ""
        text += f", {plural(found.all_gathers, 'all-gather')} (the vocab-parallel output{tied})"
    if found.encoder:
        text += f"; {plural(found.encoder, 'all-reduce')} per prompt in the encoder"
    return text


def _fate_text(group: Group) -> str:
    shape, dim = list(group.example.spec.shape), group.example.dim
    if dim is None:
        once = ", added once after the sum" if group.example.style == "row" else ""
        return f"{shape} {group.fate}{once}"
    held = [shard.shape[dim] for shard in group.shards if shard]
    low, high = min(held), max(held)
    local = [str(n) for n in shape]
    local[dim] = str(low) if low == high else f"{low}..{high}"
    fate = "" if group.fate == "split" else f", {group.fate}"
    return f"dim {dim}  {shape} -> [{', '.join(local)}] each{fate}"
