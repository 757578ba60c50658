"""What a model keeps of each token for the tokens after it. Arithmetic only.

If a config does not state a number, it is not guessed: the answer says what is missing.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardkit import config_fields as fields
from shardkit.dtypes import BY_TORCH_NAME, DTYPES
from shardkit.layout.style import COLUMNS, PADDED, RECURRENT
from shardkit.planning.layout_plan import Plan
from shardkit.planning.mesh import Mesh
from shardkit.planning.parts import (
    Path,
    count_repeats,
    find_field,
    find_layer,
    generates_text,
    has_both_halves,
    is_encoder,
    is_tower,
    list_placements,
    read_count,
    select_text_fields,
)
from shardkit.planning.placement import Placement

KV_UNIT = re.compile(r"(?:^|_)kv(?:_|$)")  # in the name of the unit that other units share
KV_UNITS = ("decoder_kv_heads", "kv_heads")  # of several, the language model's
CROSS_UNIT = "cross_kv_heads"  # of cross-attention whose heads are others than the decoder's own
# The units of recipes that have no shared one, and whose keys and values are one per unit.
HEAD_UNITS = ("decoder_heads", "heads", "quarter")
FIXED = "none: the model keeps a state of a fixed size, and no more for each token"
ANEW = "none: the model keeps nothing, and computes every token anew"


@dataclass(frozen=True, slots=True)
class KvCache:
    """The keys and values kept for one token, as long as it is within every layer's window.

    Attributes:
        layers: The layers that keep them.
        head_dim: The values of one key.
        dtype: Their safetensors dtype.
        kv_heads: The kv heads of each rank, copies counted.
        tensors: Keys and values are 2; a latent vector that stands for both is 1.
        is_crossed: Whether each position of an encoder takes as much, once per prompt.
        others: What layers of other kinds keep, which have other kv heads.
    """

    layers: int
    head_dim: int
    dtype: str
    kv_heads: tuple[int, ...]
    tensors: int = 2
    is_crossed: bool = False
    others: tuple["KvCache", ...] = ()

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """The bytes each rank keeps for one token."""
        value = self.tensors * self.layers * self.head_dim * DTYPES[self.dtype].bits // 8
        own = tuple(value * heads for heads in self.kv_heads)
        return tuple(map(sum, zip(own, *(other.rank_bytes for other in self.others), strict=True)))


def estimate_kv_cache(plan: Plan, config: Mapping[str, Any]) -> KvCache | str:
    """What one token adds to the cache; or, in words, that there is none, or why it is unknown."""
    if reason := _explain_no_cache(plan, config):
        return reason
    config = select_text_fields(config)
    units, dtype = list_kv_units(plan), find_compute_dtype(plan, config)
    if not units:
        return "unknown: cannot tell which unit of the recipe counts the kv heads"
    if dtype is None:
        return "unknown: neither config.json nor the weights state a dtype that models compute in"
    kinds = [_estimate_kind(plan, config, unit, dtype) for unit in units]
    if reason := next((kind for kind in kinds if isinstance(kind, str)), ""):
        return reason
    first, *others = (kind for kind in kinds if isinstance(kind, KvCache))
    return replace(first, others=tuple(others))


def _estimate_kind(plan: Plan, config: Mapping[str, Any], unit: str, dtype: str) -> KvCache | str:
    """What the layers keep whose kv heads one unit counts."""
    if (layers := _count_layers(plan, config, unit)) is None:
        return "unknown: config.json does not state the number of layers"
    if latent := read_count(config, fields.KV_LATENT):
        width = latent + (read_count(config, fields.ROPE_KEY) or 0)
        layers = _count_latent_layers(plan, width) or layers
        return KvCache(layers, width, dtype, (1,) * plan.mesh.world_size, tensors=1)
    head_dim = _find_head_dim(plan, config, unit)
    kv_heads = _count_kv_heads(plan, config, unit, plan.mesh)
    if head_dim is None or kv_heads is None:
        what = "one width of a head" if head_dim is None else "the number of kv heads"
        return f"unknown: neither config.json nor the weights state {what}"
    has_halves = has_both_halves(group.path for group in plan.weights.groups)
    is_crossed = has_halves and CROSS_UNIT not in plan.units
    return KvCache(layers, head_dim, dtype, kv_heads, is_crossed=is_crossed)


def _explain_no_cache(plan: Plan, config: Mapping[str, Any]) -> str:
    """Why a model keeps no keys and values, or not only these; empty if it keeps them."""
    if not generates_text(plan, config):
        return "none: an encoder keeps no cache"
    config = select_text_fields(config)
    if list_placements(plan, RECURRENT) or find_field(config, fields.FIXED_STATE):
        return FIXED
    if any(name in config for name in fields.UNCACHED):
        return ANEW
    if unusual := find_field(config, fields.OTHER_CACHES):
        return f"unknown: config.json has {unusual}, so more or other than keys and values is kept"
    return ""


def find_compute_dtype(plan: Plan, config: Mapping[str, Any]) -> str | None:
    """The dtype the model runs in: the config's, or the one most weights are stored in."""
    for key in fields.DTYPE:
        stated = BY_TORCH_NAME.get(str(config.get(key)))
        if stated is not None and stated.is_compute:
            return stated.name
    stored = Counter[str]()
    for group in plan.loaded_groups:
        stored[group.tensors.dtype] += group.count
    most = max(stored, key=stored.__getitem__, default=None)
    return most if most is not None and DTYPES[most].is_compute else None


def list_kv_units(plan: Plan) -> list[str]:
    """The units that count kv heads, or sets of them: one, or one for each kind of layers."""
    counted = {name: unit for name, unit in plan.units.items() if unit.count is not None}
    shared = [
        name
        for name, unit in counted.items()
        if unit.shared_by and KV_UNIT.search(name) and not name.startswith(fields.TOWER_UNITS)
    ]
    weights = {name: _list_kv_weights(plan, name) for name in shared}
    shared = [name for name in shared if weights[name]]  # not a tower's
    paths = [p.spec.name.split(".") for name in shared for p in weights[name]]
    lists = {layer[0] for path in paths if (layer := find_layer(path))}
    if len(shared) > 1 and (len(lists) > 1 or KV_UNITS[0] in shared):
        return [name for name in KV_UNITS if name in shared][:1]  # of several decoders, say
    return shared or [name for name in HEAD_UNITS if name in counted][:1]


def _list_kv_weights(plan: Plan, unit: str) -> list[Placement]:
    """The loaded matrices of the language model's decoder that a unit divides the output of."""
    groups = [
        group
        for group in plan.loaded_groups
        if group.layout.style in COLUMNS and unit in group.layout.units
        if len(group.tensors.shape) > 1
    ]
    both = has_both_halves(group.path for group in groups)

    def is_elsewhere(path: Path) -> bool:
        return is_encoder(path) if both else not fields.CROSS_MODULES.isdisjoint(path)

    return [
        p
        for group in groups
        if not is_tower(group.path) and not is_elsewhere(group.path)
        for p in group.list_placements()
    ]


def _count_layers(plan: Plan, config: Mapping[str, Any], unit: str) -> int | None:
    """The layers that keep keys and values: those that have weights for them.

    Not the last ones, if these use the keys and values of another. Each pass through a stack of
    layers that takes several keeps its own.
    """
    stated = read_count(config, fields.DECODER_LAYERS + fields.LAYERS)
    if read_count(config, fields.LAYERS_PER_STACK):
        return stated
    paths = [p.spec.name.split(".") for p in _list_kv_weights(plan, unit)]
    for module in fields.REPEATED_BLOCKS:
        if any(module in path for path in paths):
            return count_repeats(config, module)
    layers = {layer for path in paths if (layer := find_layer(path))}
    own = (stated or 0) - (read_count(config, fields.KV_SHARED) or 0)
    if stated and len(layers) > own:
        layers = {(name, number) for name, number in layers if number < own}
    return len(layers) or (own if stated else None)


def _count_latent_layers(plan: Plan, width: int) -> int:
    """The attention layers with a weight that makes the latent vector; others keep no such.

    Of modules of one name only: another may be as wide by chance.
    """
    modules = Counter(
        p.spec.name.split(".")[-2]
        for group in plan.loaded_groups
        if group.layout.dim is None and len(group.tensors.shape) == 2
        if group.tensors.shape[0] == width and "." in group.tensors.pattern
        for p in group.list_placements()
    )
    return max(modules.values(), default=0)


def count_whole_kv_heads(plan: Plan, config: Mapping[str, Any]) -> int:
    """The kv heads that a layer caches if there is one rank, of a plan that has such a cache."""
    config, units = select_text_fields(config), list_kv_units(plan)
    if read_count(config, fields.KV_LATENT):
        return 1
    return sum(_count_kv_heads(plan, config, units[0], Mesh(1)) or (1,))


def _count_kv_heads(
    plan: Plan, config: Mapping[str, Any], unit: str, mesh: Mesh
) -> tuple[int, ...] | None:
    """The kv heads of each rank of a mesh; a replicated K and V are one head on every rank.

    Padded with zeros, every rank keeps as many as all ranks. A unit may be a set of several kv
    heads, if the config counts more of them.
    """
    replicated = {s.units for g in plan.weights.groups for s in g.layout.sections if s.replicated}
    if replicated:
        return (1,) * mesh.world_size if replicated == {2} else None
    is_expanded = find_field(config, fields.EXPANDED_KV) is not None
    unit = next((name for name in HEAD_UNITS if is_expanded and name in plan.units), unit)
    shared = plan.units[unit].shared_by
    names = fields.KV_HEADS if shared else fields.DECODER_HEADS + fields.HEADS
    sets = plan.units[unit].count or 1
    stated = read_count(config, names) if len(list_kv_units(plan)) == 1 else sets
    heads_per_set, rest = divmod(stated or sets, sets)
    if rest:
        return None
    if any(p.style is PADDED for p in _list_kv_weights(plan, unit)):
        return (heads_per_set * sets,) * mesh.world_size
    ranks = mesh.ranks()
    return tuple(heads_per_set * plan.count_local_units(unit, rank) for rank in ranks)


def _find_head_dim(plan: Plan, config: Mapping[str, Any], unit: str) -> int | None:
    """The width of a kv head: a shared unit's own length, or else what the config says."""
    counts = plan.units[unit].count, plan.units[unit].shared_by
    sizes = {
        section.size
        for p in _list_kv_weights(plan, unit)
        for section in p.sections
        if section.shared_by and (section.units, section.shared_by) == counts
        if section.size > 1  # a norm's weight may have a row for each head
    }
    if sizes:
        return sizes.pop() if len(sizes) == 1 else None
    if (stated := read_count(config, fields.HEAD_DIM)) is not None:
        return stated
    hidden = read_count(config, fields.HIDDEN_SIZE + fields.OTHER_WIDTHS)
    heads = read_count(config, fields.DECODER_HEADS + fields.HEADS)
    return hidden // heads if hidden and heads and hidden % heads == 0 else None
