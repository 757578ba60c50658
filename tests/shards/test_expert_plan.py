"""What a manifest says of whole experts: read back as it was, or refused in a line."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from shardkit.errors import LayoutError
from shardkit.planning import Plan, make_plan
from shardkit.recipe import find_recipe
from shardkit.shards.plan_json import OPTIONAL_KEYS, parse_plan, plan_to_json
from shardkit.strict_json import JsonError, JsonObject
from tests.helpers.manifests import changed as put
from tests.helpers.synthetic_checkpoints import specs_of
from tests.planning.test_experts import GPT_OSS, LAYER, MIXTRAL, ROUTED, list_mixtral

ONE = f"{ROUTED}experts.3.w1.weight"
STACK = f"{LAYER}mlp.experts.down_proj"
PLAN = make_plan(specs_of(list_mixtral()), find_recipe(MIXTRAL), MIXTRAL, 2, True)
STACKED = make_plan(specs_of({STACK: (5, 24, 32)}), find_recipe(GPT_OSS), GPT_OSS, 2, True)
Table = dict[str, Any]


def parse(table: Table, plan: Plan) -> Plan:
    keys = " ".join(sorted(table.keys() - set(OPTIONAL_KEYS.split())))
    fields = JsonObject(table, "manifest", keys, OPTIONAL_KEYS)
    read = parse_plan(fields, [placement.spec.name for placement in plan.placements])
    read.check()
    return read


def to_table(plan: Plan) -> Table:
    table: Table = json.loads(json.dumps(plan_to_json(plan)))
    return table


@pytest.mark.parametrize("plan", [PLAN, STACKED])
def test_a_plan_of_whole_experts_is_read_back(plan: Plan) -> None:
    assert plan_to_json(parse(to_table(plan), plan)) == to_table(plan)


@pytest.mark.parametrize(
    ("plan", "change", "message"),
    [
        (PLAN, put("tensors", ONE, "expert", to=[5, 5]), "is 5, not an integer of 0 to 4"),
        (PLAN, put("tensors", ONE, "expert", to=[0, 0]), "is 0, not an integer of 1"),
        (PLAN, put("tensors", ONE, "expert", to=[1]), r"expert is not \[number, count\]"),
        (PLAN, put("tensors", ONE, "expert", to=[0, 1]), "1 experts cannot be divided over"),
        (PLAN, put("tensors", ONE, "style", to="replicate"), "neither one expert's nor a stack"),
        (PLAN, put("tensors", ONE, "dim", to=0), "neither one expert's nor a stack"),
        (PLAN, put("mesh", "ep_size", to=1), "ep_size 1: is not that of the experts' layout"),
        (PLAN, put("mesh", "ep_size", to=3), "ep_size 3 is neither 1 nor the tp_size 2"),
        (STACKED, put("tensors", STACK, "dim", to=1), "neither one expert's nor a stack"),
        (STACKED, put("tensors", STACK, "expert", to=[0, 5]), "neither one expert's nor a stack"),
        (
            STACKED, put("tensors", STACK, "sections", 0, "repeat", to=5),
            "neither one expert's nor a stack",
        ),
        (STACKED, put("tensors", STACK, "sections", to=[]), "neither one expert's nor a stack"),
        (STACKED, put("tensors", STACK, "style", to="column"), "ep_size 2: is not that of the"),
    ],
)  # fmt: skip
def test_what_no_plan_can_say_is_refused(
    plan: Plan, change: Callable[[Table], None], message: str
) -> None:
    table = copy.deepcopy(to_table(plan))
    change(table)
    with pytest.raises((JsonError, LayoutError), match=message):
        parse(table, plan)
