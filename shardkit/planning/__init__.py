"""Where every tensor lies, and what it costs, before a byte of weights is read."""

from shardkit.planning.checkpoint_plan import plan_for
from shardkit.planning.costs import (
    Collectives,
    KvCache,
    count_collectives,
    estimate_kv_cache,
    generates_text,
)
from shardkit.planning.loading import decide_loading
from shardkit.planning.mesh import MAX_TP_SIZE, Mesh, Rank
from shardkit.planning.placement import Placement, Plan, make_plan, place_tensor
from shardkit.planning.report import PlanReport, plan
from shardkit.planning.summary import (
    Imbalance,
    PlanSummary,
    TensorGroup,
    describe_treatment,
    describe_units,
    find_blocking_tensor,
    summarize_plan,
)

__all__ = [
    "MAX_TP_SIZE",
    "Collectives",
    "Imbalance",
    "KvCache",
    "Mesh",
    "Placement",
    "Plan",
    "PlanReport",
    "PlanSummary",
    "Rank",
    "TensorGroup",
    "count_collectives",
    "decide_loading",
    "describe_treatment",
    "describe_units",
    "estimate_kv_cache",
    "find_blocking_tensor",
    "generates_text",
    "make_plan",
    "place_tensor",
    "plan",
    "plan_for",
    "summarize_plan",
]
