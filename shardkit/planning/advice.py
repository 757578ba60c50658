"""Which number of ranks to take for some devices: what fits, and what it costs. Arithmetic only.

Bytes of weights and of the KV cache are the plan's, exact. What a token reads and sends, and how
long that takes, are estimates by the formulas below, for one sequence at a time.

    read     a rank's weights, without an embedding, of which one row is looked up; of experts the
             share that a token is routed to, evenly over the ranks
    sent     2 (n - 1) / n of a hidden state for each all-reduce, and (n - 1) / n of the logits
             for an all-gather: what each rank of a ring of n sends
    seconds  read / memory bandwidth + sent / link bandwidth + collectives * latency
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardkit import config_fields as fields
from shardkit.dtypes import DTYPES
from shardkit.errors import LayoutError, UsageError
from shardkit.layout.style import VOCAB
from shardkit.planning.collectives import (
    Collectives,
    count_collectives,
    list_outputs,
    read_experts_per_token,
)
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache, find_compute_dtype
from shardkit.planning.layout_plan import Plan
from shardkit.planning.parts import list_placements, read_count, select_text_fields
from shardkit.planning.placement_table import PlacementGroup
from shardkit.planning.summary import summarize_plan

USABLE = 0.9  # of a device's memory: the rest is for activations and libraries
EXPERT_NUMBER = re.compile(rf"\.{fields.EXPERTS_MODULE}\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """What connects devices: bytes per second in one direction, and seconds per collective."""

    bandwidth: float
    latency: float


# NVLink of an H100: 900 GB/s in both directions. PCIe 4.0 with 16 lanes. Ethernet of 100 Gbit/s.
# Latencies of small collectives are orders of magnitude.
LINKS = {
    "nvlink": DeviceLink(450e9, 10e-6),
    "pcie": DeviceLink(32e9, 20e-6),
    "ethernet": DeviceLink(12.5e9, 50e-6),
}
MEMORY_BANDWIDTH = 2_000_000_000_000  # bytes per second of an A100 of 80 GB: 2039 GB/s


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that there are.

    Attributes:
        count: How many.
        memory: Bytes of each.
        link: One of LINKS.
        bandwidth: Bytes per second of each one's memory.
    """

    count: int
    memory: int
    link: str = "nvlink"
    bandwidth: int = MEMORY_BANDWIDTH

    @property
    def usable(self) -> int:
        """Bytes of each for weights and cache."""
        return int(USABLE * self.memory)


@dataclass(frozen=True, slots=True)
class DeviceOption:
    """One way to use the devices; bytes are those of the largest rank.

    Attributes:
        tp_size: The ranks of a replica.
        is_expert_parallel: Whether each rank has whole experts.
        replicas: How many copies of the model the devices hold.
        weight_bytes: What a rank loads.
        kv_bytes: What a rank keeps of one token; 0 for nothing, None if unknown.
        kv_tokens: For how many tokens a replica has room; None if unknown, or without limit.
        fits: Whether the weights fit.
        read_bytes: Estimated: what a rank reads for a token.
        sent_bytes: Estimated: what a rank sends for a token; None if the config states no width.
        collectives: How many there are for a token.
        seconds: Estimated: for a token; None if `sent_bytes` is.
    """

    tp_size: int
    is_expert_parallel: bool
    replicas: int
    weight_bytes: int
    kv_bytes: int | None
    kv_tokens: int | None
    fits: bool
    read_bytes: int
    sent_bytes: int | None
    collectives: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Advice:
    """What fits on some devices, and which way to take.

    Attributes:
        devices: The devices.
        options: Every way, by size; of one size, parts of every expert first.
        refused: Why a size is impossible, by size.
        choice: The one to take; None if none fits.
        reason: Why, in words.
        context: The most tokens that the model was made for, if config.json says.
    """

    devices: Devices
    options: tuple[DeviceOption, ...]
    refused: Mapping[int, str]
    choice: DeviceOption | None
    reason: str
    context: int | None


def advise_devices(
    plan: Plan, expert_plan: Plan | None, config: Mapping[str, Any], devices: Devices
) -> Advice:
    """Compare the numbers of ranks that divide the devices.

    Args:
        plan: A plan of the checkpoint, over any number of ranks.
        expert_plan: The same with whole experts on each rank; None if it has none.
        config: The checkpoint's config.json.
        devices: The devices.

    Raises:
        UsageError: There is no such link, or there are no devices or no memory.
    """
    if devices.link not in LINKS:
        raise UsageError(f"link {devices.link!r}: it must be one of {', '.join(LINKS)}")
    if devices.count < 1 or devices.memory < 1:
        raise UsageError(f"{devices.count} devices of {devices.memory} bytes: name one or more")
    options: list[DeviceOption] = []
    refused: dict[int, str] = {}
    for tp_size in (n for n in range(1, devices.count + 1) if devices.count % n == 0):
        try:
            options.append(measure_option(plan.with_tp_size(tp_size), config, devices))
        except LayoutError as error:
            refused[tp_size] = str(error)
        if expert_plan is not None and tp_size > 1:
            try:
                options.append(measure_option(expert_plan.with_tp_size(tp_size), config, devices))
                refused.pop(tp_size, None)
            except LayoutError:
                continue
    context = read_count(select_text_fields(config), fields.POSITIONS)
    return Advice(devices, tuple(options), refused, *_choose_option(options, context), context)


def measure_option(plan: Plan, config: Mapping[str, Any], devices: Devices) -> DeviceOption:
    """What a plan takes on each device, and what a token costs."""
    summary = summarize_plan(plan)
    weight_bytes, cache = max(summary.loaded_bytes), estimate_kv_cache(plan, config)
    rank = summary.loaded_bytes.index(weight_bytes)
    kv_bytes = max(cache.rank_bytes) if isinstance(cache, KvCache) else None
    if isinstance(cache, str) and cache.startswith("none"):
        kv_bytes = 0
    room = devices.usable - weight_bytes
    collectives = count_collectives(plan, config)
    count = collectives.all_reduces + collectives.all_gathers
    read_bytes = _estimate_read(plan, config, rank, collectives)
    sent_bytes = _estimate_sent(plan, config, collectives)
    link, seconds = LINKS[devices.link], None
    if sent_bytes is not None:
        seconds = read_bytes / devices.bandwidth + sent_bytes / link.bandwidth
        seconds += count * link.latency
    return DeviceOption(
        plan.tp_size, plan.is_expert_parallel, devices.count // plan.tp_size, weight_bytes,
        kv_bytes, max(room, 0) // kv_bytes if kv_bytes else None, room >= 0, read_bytes,
        sent_bytes, count, seconds,
    )  # fmt: skip


def _choose_option(
    options: list[DeviceOption], context: int | None
) -> tuple[DeviceOption | None, str]:
    """The smallest size with room for a whole context, and why."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None, "the weights fit in no way"
    roomy = [o for o in fitting if o.kv_tokens is None or o.kv_tokens >= (context or 1)]
    if not roomy:
        return (
            max(fitting, key=lambda option: option.kv_tokens or 0),
            f"no way has room for the {context} tokens of a whole context; this one has most",
        )
    smallest = min(option.tp_size for option in roomy)
    alike = [option for option in roomy if option.tp_size == smallest]
    choice = min(alike, key=lambda option: option.seconds or math.inf)
    room = f" and the {context} tokens of a whole context" if context and choice.kv_tokens else ""
    reason = f"the fewest ranks that have room for the weights{room}; replicas exchange nothing"
    if len({option.seconds for option in alike}) > 1:
        kind = "whole experts" if choice.is_expert_parallel else "parts of every expert"
        reason += f"; by the estimate {kind} take less time"
    return choice, reason


def _estimate_read(
    plan: Plan, config: Mapping[str, Any], rank: int, collectives: Collectives
) -> int:
    """Bytes of weights that a rank reads for a token."""
    top_k, total = read_experts_per_token(config), 0.0
    vocab = list_placements(plan, VOCAB)
    outputs = vocab if collectives.is_tied else list_outputs(vocab)
    looked_up = {p.spec.name for p in vocab} - {p.spec.name for p in outputs}
    for group in plan.groups:
        name = group.first.spec.name
        if not group.layout.is_loaded or name in plan.grouping.unused or name in looked_up:
            continue
        part = group.first.shard_spec(plan.mesh.rank(rank))
        nbytes = group.count * part.nbytes if part else 0
        experts = _count_experts(group)
        total += nbytes * min(top_k / experts, 1.0) if top_k and experts else nbytes
    return round(total)


def _count_experts(group: PlacementGroup) -> int | None:
    """How many experts a mixture has, of whose tensors this is a group."""
    if group.layout.expert is not None:
        return group.layout.expert.count
    numbers = [int(m[1]) for name in group.tensors.names if (m := EXPERT_NUMBER.search(name))]
    if numbers:
        return max(numbers) + 1
    shape = group.first.spec.shape
    is_stack = fields.EXPERTS_MODULE in group.path and len(shape) > 2
    return shape[0] if is_stack else None


def _estimate_sent(plan: Plan, config: Mapping[str, Any], collectives: Collectives) -> int | None:
    """Bytes that each rank of a ring sends for a token; None if a width is not stated."""
    text, size = select_text_fields(config), plan.tp_size
    if size == 1:
        return 0
    hidden, vocab = read_count(text, fields.HIDDEN_SIZE), read_count(text, fields.VOCAB_SIZE)
    dtype = find_compute_dtype(plan, text)
    if hidden is None or dtype is None or (vocab is None and collectives.all_gathers):
        return None
    values = 2 * collectives.all_reduces * hidden + collectives.output * (vocab or 0)
    values += collectives.gathered * hidden
    return values * (size - 1) * (DTYPES[dtype].bits // 8) // size
