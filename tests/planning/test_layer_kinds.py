"""Lists of modules: experts that lack nothing are left out, and what lacks something is seen."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.layout.style import COLUMN
from shardkit.planning import Layout, PlacementTable
from shardkit.planning import layer_kinds as module
from shardkit.planning.completeness import _find_odd_layer
from shardkit.planning.layer_kinds import group_tensors
from shardkit.planning.placement import Placement
from shardkit.tensor import TensorSpec

MODULES = [f"experts.{number}.{name}" for number in (0, 1, 2, 10) for name in ("up", "down")]
NAMES = [f"layers.{layer}.{name}.weight" for layer in range(3) for name in (*MODULES, "norm")]


def find_odd(
    names: Iterable[str], shape: tuple[int, ...] = (4, 4)
) -> set[tuple[str, tuple[str, ...]]]:
    placements = [Placement(TensorSpec(name, "F32", shape), Layout(COLUMN)) for name in names]
    lists = group_tensors(PlacementTable.of(placements).groups).items()
    odd = [_find_odd_layer(name, layers) for name, layers in lists]
    return {(layer.name, layer.missing) for layer in odd if layer is not None}


def test_a_whole_mixture_has_no_odd_layer_and_few_names() -> None:
    assert not find_odd(NAMES)
    placements = [Placement(TensorSpec(name, "F32", (4,)), Layout(COLUMN)) for name in NAMES]
    lists = group_tensors(PlacementTable.of(placements).groups)
    assert set(lists["layers"][2]) == {
        "experts.0.up.weight",
        "experts.0.down.weight",
        "norm.weight",
    }
    assert set(lists["layers.0.experts"]) == {0, 1, 2, 10}


def test_one_expert_without_a_weight_is_odd() -> None:
    name = "layers.1.experts.2.up.weight"
    odd = find_odd(set(NAMES) - {name})
    assert ("layers.1.experts.2", ("up.weight",)) in odd
    assert ("layers.1", ("experts.2.up.weight",)) in odd


@given(st.sets(st.sampled_from(NAMES), max_size=4), st.integers(1, 3))
def test_leaving_whole_stacks_out_changes_no_verdict(absent: set[str], layers: int) -> None:
    kept = [name for name in NAMES if int(name.split(".")[1]) < layers]
    names = [name for name in kept if name not in absent]
    quick = find_odd(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_find_first", lambda *args: None)
        assert find_odd(names) == quick
