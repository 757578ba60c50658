"""Units that stay together: whole groups, while there are as many as ranks."""

from pathlib import Path

import pytest

from shardkit.planning import Mesh, make_plan
from shardkit.recipe.parse import load_recipe
from tests.helpers.synthetic_checkpoints import specs_of

GROUPED = """
model_types = ["sample"]

[units]
groups = { count = "num_groups", shared_by = "halves" }
halves = { count = "2 num_groups", block = 2 }

[column]
"model.q_proj" = "groups"
"model.out_a" = "halves"

[row]
"model.out_b" = "halves"
"""


@pytest.mark.parametrize(
    ("tp_size", "groups", "halves"),
    [
        (3, [(0, 2), (2, 3), (3, 4)], [(0, 4), (4, 6), (6, 8)]),
        (4, [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (6, [(0, 1), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4)],
         [(0, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8)]),
        (8, [(at // 2, at // 2 + 1) for at in range(8)], [(at, at + 1) for at in range(8)]),
    ],
)  # fmt: skip
def test_units_stay_in_blocks_while_there_are_as_many_as_ranks(
    tp_size: int, groups: list[tuple[int, int]], halves: list[tuple[int, int]], tmp_path: Path
) -> None:
    path = tmp_path / "grouped.toml"
    path.write_text(GROUPED)
    shapes = {"model.q_proj.weight": (4, 6), "model.out_a.weight": (8, 6)}
    specs = specs_of(shapes | {"model.out_b.weight": (6, 8)}, "BF16")
    config = {"model_type": "sample", "num_groups": 4}
    plan = make_plan(specs, load_recipe(path), config, 1).with_tp_size(tp_size)
    ranks = list(Mesh(tp_size).ranks())
    for name, spans in (("q_proj", groups), ("out_a", halves), ("out_b", halves)):
        (held,) = (p for p in plan.placements if name in p.spec.name)
        assert [held.spans(rank) for rank in ranks] == [(span,) for span in spans]
