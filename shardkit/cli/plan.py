"""`shardkit plan`: what a split would hold and cost, from headers and config alone."""

from collections import Counter
from typing import Any

import click

from shardkit.cli.options import ALLOW_PICKLE, EXPERT_PARALLEL, JSON, RECIPE, REVISION
from shardkit.cli.output import (
    format_bytes,
    format_count,
    group_ranks,
    print_json,
    print_line,
    print_warning,
)
from shardkit.cli.plan_bytes import plan_bytes_to_json, print_plan_bytes
from shardkit.cli.plan_devices import add_device_options, show_advice
from shardkit.cli.plan_groups import group_to_json, print_groups
from shardkit.errors import UsageError
from shardkit.planning import (
    Collectives,
    Devices,
    KvCache,
    KvCopies,
    Plan,
    PlanReport,
    compare_sizes,
    list_shared_blocks,
    list_unloaded,
)
from shardkit.planning import plan as plan_source
from shardkit.strict_json import put_off_collection


@click.command()
@put_off_collection()
@click.argument("source")
@click.option("--tp", "tp_size", type=click.IntRange(min=1), metavar="N", help="Number of ranks.")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    metavar="N",
    help="Instead of --tp: compare the numbers of ranks that N devices could run.",
)
@add_device_options
@EXPERT_PARALLEL
@RECIPE
@REVISION
@ALLOW_PICKLE
@JSON
def plan(
    source: str,
    tp_size: int | None,
    devices: int | None,
    memory: int | None,
    link: str,
    memory_bandwidth: int,
    expert_parallel: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what each rank would hold and cost.

    SOURCE is a folder of safetensors files with its config.json, or a Hub id such as org/name.
    Only headers and the config are read, so a model of any size takes about a second.

    \b
    Example:
      shardkit plan models/llama --tp 8
      shardkit plan models/llama --tp 8 --json
      shardkit plan models/llama --devices 8 --memory 80G --link nvlink
    """
    if (tp_size is None) == (devices is None):
        raise UsageError("name either --tp, to plan it, or --devices, to compare sizes")
    if devices is not None:
        if memory is None or expert_parallel:
            raise UsageError("--devices needs --memory, and compares whole experts, too")
        given = Devices(devices, memory, link, memory_bandwidth)
        show_advice(source, compare_sizes(source, given, **options), as_json)
        return
    assert tp_size is not None
    report = plan_source(source, tp_size, expert_parallel=expert_parallel, **options)
    for warning in report.warnings:
        print_warning(warning)
    if as_json:
        print_json(plan_to_json(report))
    else:
        _print_plan(report)


def plan_to_json(report: PlanReport) -> dict[str, Any]:
    """The whole plan as JSON values: bytes are exact integers, one entry per rank."""
    return {
        "source": report.source,
        "revision": report.revision,
        "model_type": report.model_type,
        "recipe": report.recipe.name,
        "wrapper_prefix": report.plan.wrapper_prefix,
        "model_class": report.plan.model_class or None,
        "not_loaded": list(list_unloaded(report.plan)),
        "quantization": _quantization_to_json(report.plan),
        **plan_bytes_to_json(report.summary),
        "groups": [group_to_json(group) for group in report.summary.groups],
        "kv_cache": _kv_cache_to_json(report.kv_cache),
        "shared_block_bytes": report.shared_block_bytes,
        "kv_copies": _kv_copies_to_json(report.kv_copies),
        "collectives": _collectives_to_json(report.collectives),
        "possible_tp": {
            "smallest": 1,
            "largest": report.max_tp_size,
            "blocked_by": report.blocking_tensor,
        },
    }


def _quantization_to_json(plan: Plan) -> list[dict[str, Any]]:
    """Each format with its numbers, 0 for a whole axis, and how many weights are of it."""
    alike = plan.grouping.alike
    return [
        {
            "format": scheme.format.name,
            "numbers": {name: number or 0 for name, number in scheme.numbers.items()},
            "weights": sum(len(each.names) for each in alike if each.kind.scheme is scheme),
        }
        for scheme in plan.grouping.schemes
    ]


def _kv_cache_to_json(cache: KvCache | str) -> dict[str, Any]:
    if isinstance(cache, str):
        return {"bytes_per_token": None, "reason": cache}
    return {
        "bytes_per_token": sum(cache.rank_bytes),
        "bytes_per_token_by_rank": list(cache.rank_bytes),
        "layers": cache.layers,
        "head_dim": cache.head_dim,
        "dtype": cache.dtype,
        "kv_heads_by_rank": list(cache.kv_heads),
        "is_latent": cache.tensors == 1,
        "as_much_per_encoder_position": cache.is_crossed,
        "other_layers": [_kv_cache_to_json(other) for other in cache.others],
    }


def _kv_copies_to_json(copies: KvCopies | None) -> dict[str, Any] | None:
    if copies is None:
        return None
    return {
        "kv_heads": copies.kv_heads,
        "cache_growth": round(copies.cache_growth, 3),
        "weight_growth": round(copies.weight_growth, 3),
        "even_tp_sizes": list(copies.even_tp_sizes),
    }


def _collectives_to_json(collectives: Collectives) -> dict[str, Any]:
    return {
        "all_reduces": collectives.all_reduces,
        "all_gathers": collectives.all_gathers,
        "row_parallel": collectives.row_parallel,
        "expert_stacks": collectives.expert_stacks,
        "joint": collectives.joint,
        "embedding": collectives.embedding,
        "output": collectives.output,
        "output_is_tied": collectives.is_tied,
        "encoder_all_reduces": collectives.encoder,
        "experts_one_by_one": collectives.is_routed,
    }


def _print_plan(report: PlanReport) -> None:
    plan, summary = report.plan, report.summary
    tensors, total = format_count(len(plan.placements), "tensor"), summary.total_bytes
    print_line(
        f"{report.source}: {report.model_type}, recipe {report.recipe.name}, {tensors},"
        f" {format_bytes(total)}"
    )
    if plan.wrapper_prefix:
        print_line(
            f"Prefix       {plan.wrapper_prefix} before every tensor's name is a training"
            " wrapper's: it is ignored, and a merge gives it back"
        )
    _print_loading(plan)
    if plan.grouping.alike:
        print_line(f"Quantized    {_describe_quantization(plan)}")
    ranks = format_count(plan.tp_size, "rank")
    print_line(f"Over {ranks}, each one's file and its weights in memory:")
    print_plan_bytes(summary)
    if report.shared_block_bytes:
        print_line(f"Block copies {_describe_block_copies(report)}")
    _print_kv_cache(report.kv_cache)
    if (copies := report.kv_copies) is not None:
        print_line(f"KV copies    {_describe_kv_copies(copies, plan.tp_size)}")
    print_line(f"Collectives  {_describe_collectives(report.collectives, plan.tp_size)}")
    blocked = report.blocking_tensor
    why = f"; {blocked} divides no further" if blocked else ""
    print_line(f"Possible     tp_size 1 to {report.max_tp_size}{why}")
    print_groups(summary)


def _describe_quantization(plan: Plan) -> str:
    """The formats of quantized weights, and what stays together to keep blocks whole."""
    counts = Counter[str]()
    for each in plan.grouping.alike:
        counts[each.kind.scheme.format.title] += len(each.names)
    text = ", ".join(f"{format_count(count, 'weight')} in {name}" for name, count in counts.items())
    blocks = [
        f"{count} {name} in blocks of {block}"
        for name, unit in plan.units.items()
        for count, block in unit.blocks.items()
    ]
    return f"{text}; {', '.join(blocks)}" if blocks else text


def _describe_block_copies(report: PlanReport) -> str:
    """What it costs that several ranks store a block, since each computes a part of it."""
    shared = ", ".join(list_shared_blocks(report.plan))
    why = f": {shared} are fewer blocks than ranks" if shared else ""
    copies = format_bytes(report.shared_block_bytes)
    return f"{copies} in all of quantized blocks that several ranks have a part of{why}"


def _print_loading(plan: Plan) -> None:
    """What config.json does not say: the class, and the tensors that it has no place for."""
    if plan.model_class:
        print_line(
            f"Class        {plan.model_class}, which the tensors fit; config.json names none"
        )
    if unloaded := list_unloaded(plan):
        tensors = format_count(len(unloaded), "tensor")
        print_line(
            f"Not loaded   {tensors} that the model's class has no place for, as transformers does,"
            f" kept for a merge: {unloaded[0]}{', ...' if unloaded[1:] else ''}"
        )


def _print_kv_cache(cache: KvCache | str) -> None:
    if isinstance(cache, str):
        print_line(f"KV cache     {cache}")
        return
    per_rank = ", ".join(f"{ranks}: {nbytes:,}" for ranks, nbytes in group_ranks(cache.rank_bytes))
    print_line(f"KV cache     {sum(cache.rank_bytes):,} bytes per token ({per_rank})")
    for kind in (cache, *cache.others):
        what = _describe_heads(kind) if kind.tensors > 1 else _describe_latent(kind)
        print_line(f"             {format_count(kind.layers, 'layer')}, {what}, {kind.dtype}")
    if cache.is_crossed:
        print_line("             and as much for each position of the encoder, once per prompt")


def _describe_heads(cache: KvCache) -> str:
    heads = ", ".join(
        f"{format_count(count, 'kv head')} on {ranks}"
        for ranks, count in group_ranks(cache.kv_heads)
    )
    return f"{heads}, head_dim {cache.head_dim}"


def _describe_latent(cache: KvCache) -> str:
    return f"a latent of {cache.head_dim} for all heads, on every rank"


def _describe_kv_copies(copies: KvCopies, tp_size: int) -> str:
    """What copies of kv heads cost against an even split, and the sizes that avoid them."""
    growths = (
        ("the KV cache", copies.cache_growth),
        ("the weights of kv heads", copies.weight_growth),
    )
    parts = [f"{what} is {growth:.2f} times" for what, growth in growths if growth > 1]
    text = " and ".join(parts).replace("heads is", "heads are")
    heads = format_count(copies.kv_heads, "kv head")
    verb = "does" if copies.kv_heads == 1 else "do"
    sizes = " or ".join(map(str, copies.even_tp_sizes))
    return (
        f"{text} an even split's: {heads} {verb} not divide over {tp_size} ranks;"
        f" tp_size {sizes} avoids it"
    )


def _describe_collectives(collectives: Collectives, tp_size: int) -> str:
    if tp_size == 1:
        return "none over one rank"
    parts = [format_count(collectives.row_parallel, "row-parallel weight")]
    if collectives.expert_stacks:
        routed = ", or for each expert in use" if collectives.is_routed else ""
        parts.append(f"{format_count(collectives.expert_stacks, 'stack')} of experts{routed}")
    if collectives.joint:
        parts.append(f"{collectives.joint:,} of these summed with another")
    if collectives.embedding:
        parts.append("the vocab-parallel embedding")
    text = f"{format_count(collectives.all_reduces, 'all-reduce')} per token ({', '.join(parts)})"
    if collectives.all_gathers:
        tied = ", tied to the embedding" if collectives.is_tied else ""
        gathers = format_count(collectives.all_gathers, "all-gather")
        text += f", {gathers} (the vocab-parallel output{tied})"
    if collectives.encoder:
        text += f"; {format_count(collectives.encoder, 'all-reduce')} per prompt in the encoder"
    return text
