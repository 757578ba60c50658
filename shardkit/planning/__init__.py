"""Where every tensor lies, and what it costs, before a byte of weights is read."""

from shardkit.planning.advice import LINKS, Advice, DeviceOption, Devices, advise_devices
from shardkit.planning.checkpoint_plan import plan_for
from shardkit.planning.collectives import Collectives, count_collectives
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache
from shardkit.planning.kv_copies import KvCopies
from shardkit.planning.layout_plan import Plan
from shardkit.planning.loading import decide_loading
from shardkit.planning.make_plan import make_plan, place_tensor
from shardkit.planning.mesh import MAX_TP_SIZE, Mesh, Rank
from shardkit.planning.parts import generates_text
from shardkit.planning.placement import Expert, Layout, Placement
from shardkit.planning.placement_table import PlacementGroup, PlacementTable
from shardkit.planning.quantized import check_parts
from shardkit.planning.report import PlanReport, compare_sizes, plan
from shardkit.planning.shared_blocks import count_shared_bytes, list_shared_blocks
from shardkit.planning.summary import (
    Imbalance,
    PlanSummary,
    TensorGroup,
    describe_treatment,
    describe_units,
    find_blocking_tensor,
    list_unloaded,
    summarize_plan,
)

__all__ = [
    "LINKS",
    "MAX_TP_SIZE",
    "Advice",
    "Collectives",
    "DeviceOption",
    "Devices",
    "Expert",
    "Imbalance",
    "KvCache",
    "KvCopies",
    "Layout",
    "Mesh",
    "Placement",
    "PlacementGroup",
    "PlacementTable",
    "Plan",
    "PlanReport",
    "PlanSummary",
    "Rank",
    "TensorGroup",
    "advise_devices",
    "check_parts",
    "compare_sizes",
    "count_collectives",
    "count_shared_bytes",
    "decide_loading",
    "describe_treatment",
    "describe_units",
    "estimate_kv_cache",
    "find_blocking_tensor",
    "generates_text",
    "list_shared_blocks",
    "list_unloaded",
    "make_plan",
    "place_tensor",
    "plan",
    "plan_for",
    "summarize_plan",
]
