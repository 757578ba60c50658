"""What a manifest says of quantized weights: read back as it was, or refused in a line."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from shardkit.errors import LayoutError
from shardkit.planning import PlacementTable, check_parts
from shardkit.shards.plan_json import OPTIONAL_KEYS, parse_plan, plan_to_json
from shardkit.strict_json import JsonError, JsonObject
from tests.helpers.manifests import changed as put
from tests.recipe.formats.test_blocks import make_llama

PLAN = make_llama(576, {}, 2)
GATE = "model.layers.0.mlp.gate_proj.weight"
Table = dict[str, Any]


def parse(table: Table) -> Any:
    keys = " ".join(sorted(table.keys() - set(OPTIONAL_KEYS.split())))
    fields = JsonObject(table, "manifest", keys, OPTIONAL_KEYS)
    return parse_plan(fields, [placement.spec.name for placement in PLAN.placements])


def check_all(table: Table) -> None:
    plan = parse(table)
    plan.check()
    check_parts(PlacementTable.of(plan.placements), plan.grouping)


def test_a_plan_of_quantized_weights_is_read_back() -> None:
    table = json.loads(json.dumps(plan_to_json(PLAN)))
    plan = parse(table)
    assert plan_to_json(plan) == table
    assert [p.spec for p in plan.weights] == [p.spec for p in PLAN.weights]
    assert [p.sections for p in plan.weights] == [p.sections for p in PLAN.weights]
    assert plan.units == PLAN.units


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("quantization", 0, "format", to="fp7"), "no format 'fp7'; it may be of a later"),
        (put("quantization", 0, "numbers", to={}), "the numbers are not those of 'fp8-block'"),
        (put("quantization", 0, "numbers", "block_in", to=-1), "block_in: is -1, not an integer"),
        (put("quantization", 0, "numbers", "block_in", to=64), "has the shape [4, 4], but FP8"),
        (put("quantization", to=3), "quantization: is 3, not a list"),
        (put("units", "ffn", "blocks", to=[[576]]), "is not a count and a block"),
        (put("units", "ffn", "blocks", to=[[576, 1]]), "is 1, not an integer of 2"),
        (put("tensors", GATE, "sections", 0, "block", to=0), "block: is 0, not an integer of 2"),
        (put("tensors", GATE, "sections", 0, "block", to="x"), "block: is 'x', not an integer"),
        (put("tensors", f"{GATE}_scale_inv", "shape", to=[6, 4]), "its sections are not those"),
        (put("tensors", f"{GATE}_scale_inv", "index_size", to=0), "is 0, not an integer of 2"),
        (put("tensors", f"{GATE}_scale_inv", "block_size", to=64), "is not placed as"),
        (put("tensors", GATE, "block_size", to=64), "is not placed as"),
        (put("tensors", GATE, "style", to="row"), "is not placed as"),
    ],
)
def test_what_no_plan_can_say_is_refused(change: Callable[[Table], None], message: str) -> None:
    table = copy.deepcopy(json.loads(json.dumps(plan_to_json(PLAN))))
    change(table)
    with pytest.raises((JsonError, LayoutError)) as caught:
        check_all(table)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
