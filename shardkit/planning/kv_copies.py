"""What it costs where kv heads do not divide over the ranks, and which sizes avoid it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardkit.layout import kv_head_mode
from shardkit.planning.kv_cache import (
    KvCache,
    count_whole_kv_heads,
    estimate_kv_cache,
    list_kv_units,
)
from shardkit.planning.layout_plan import Plan
from shardkit.planning.mesh import Mesh


@dataclass(frozen=True, slots=True)
class KvCopies:
    """Copies of keys, values and their weights that an even split would not have.

    Attributes:
        kv_heads: The kv heads of the model; 1 for a key and a value, or a latent, that all share.
        cache_growth: The cache of all ranks over the unsharded model's; 1 if it is unknown.
        weight_growth: The ranks' weights of kv heads over the unsharded model's.
        even_tp_sizes: The nearest smaller and larger tp_size without copies, if there are such.
    """

    kv_heads: int
    cache_growth: float
    weight_growth: float
    even_tp_sizes: tuple[int, ...]


def find_kv_copies(plan: Plan, config: Mapping[str, Any]) -> KvCopies | None:
    """The copies that a plan makes of kv heads; None if it makes none."""
    cache_growth = _measure_growth(plan, config)
    units = list_kv_units(plan)
    unit = min(units, key=lambda name: plan.units[name].count or 0, default="")
    counted = plan.units.get(unit)
    if counted is None or not counted.count or not counted.shared_by:
        if cache_growth == 1:
            return None
        return KvCopies(1, cache_growth, _count_whole_copies(plan), (1,))
    ranks = plan.mesh.ranks()
    copies = {name: sum(plan.count_local_units(name, rank) for rank in ranks) for name in units}
    weight_growth = max(copies[name] / (plan.units[name].count or 1) for name in units)
    if weight_growth == 1 and cache_growth == 1:
        return None
    sizes = _list_even_sizes(
        counted.count, counted.shared_by, plan.count_block(unit, counted.count), plan
    )
    return KvCopies(counted.count, cache_growth, weight_growth, sizes)


def _measure_growth(plan: Plan, config: Mapping[str, Any]) -> float:
    """The bytes of all ranks' caches over those of one rank that holds everything."""
    cache = estimate_kv_cache(plan, config)
    if not isinstance(cache, KvCache):
        return 1.0
    if not cache.others:
        return sum(cache.kv_heads) / count_whole_kv_heads(plan, config)
    whole = estimate_kv_cache(replace(plan, mesh=Mesh(1)), config)
    return sum(cache.rank_bytes) / sum(whole.rank_bytes) if isinstance(whole, KvCache) else 1.0


def _count_whole_copies(plan: Plan) -> float:
    """How often a key and a value that every rank holds are stored."""
    is_held = any(section.replicated for g in plan.weights.groups for section in g.layout.sections)
    return float(plan.tp_size) if is_held else 1.0


def _list_even_sizes(kv_heads: int, heads: int, block: int, plan: Plan) -> tuple[int, ...]:
    """The nearest sizes on both sides that divide kv heads."""
    sizes = [
        size
        for size in range(1, min(plan.max_tp_size, kv_heads) + 1)
        if kv_head_mode(kv_heads, heads, size, block) == "split"
    ]
    smaller = [size for size in sizes if size < plan.tp_size][-1:]
    return (*smaller, *[size for size in sizes if size > plan.tp_size][:1])
