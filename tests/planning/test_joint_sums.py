"""Sums of row-parallel outputs that are made together: which there are, and how many they save."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shardkit
from shardkit.authoring.samples import list_samples, make_sample
from shardkit.planning import Plan, count_collectives, make_plan
from shardkit.recipe import JointSum, compose_recipe, find_recipe, match_joint_sums
from shardkit.tensor import TensorSpec

PARALLEL = {"model_type": "cohere2", "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 32, "intermediate_size": 8}  # fmt: skip
SEQUENTIAL = PARALLEL | {"model_type": "llama"}
ROWS = {"self_attn.o_proj": (16, 16), "mlp.down_proj": (16, 8)}
MIXTURE = {"model_type": "deepseek_v3", "num_attention_heads": 4, "vocab_size": 32,
           "num_experts_per_tok": 2}  # fmt: skip
EXPERTS = [f"mlp.experts.{number}.down_proj" for number in range(4)]
DEEP = {name: (16, 8) for name in (*EXPERTS, "mlp.shared_experts.down_proj")}


def plan_rows(config: dict[str, Any], *layers: Mapping[str, tuple[int, ...]]) -> Plan:
    """A plan over two ranks of layers that have these row-parallel weights alone."""
    specs = [
        TensorSpec(f"model.layers.{number}.{name}.weight", "BF16", shape)
        for number, shapes in enumerate(layers)
        for name, shape in shapes.items()
    ]
    return make_plan(specs, find_recipe(config), config, 2)


def test_a_layer_that_adds_attention_and_mlp_sums_once() -> None:
    plan = plan_rows(PARALLEL, ROWS, ROWS)
    counts = count_collectives(plan, PARALLEL)
    assert (counts.row_parallel, counts.joint) == (4, 2)
    assert counts.all_reduces - counts.embedding == 2


def test_a_layer_that_runs_one_after_the_other_sums_twice() -> None:
    plan = plan_rows(SEQUENTIAL, ROWS)
    assert plan.joint_sums == ()
    assert count_collectives(plan, SEQUENTIAL).joint == 0


def test_a_layer_without_shared_experts_has_nothing_to_join() -> None:
    dense = {"mlp.down_proj": (16, 8)}
    counts = count_collectives(plan_rows(MIXTURE, dense, DEEP), MIXTURE)
    assert (counts.row_parallel, counts.expert_stacks, counts.joint) == (2, 1, 1)


def test_summands_are_those_of_one_layer_and_by_their_whole_names() -> None:
    joint = JointSum("layers.*", ("attn.o", "mlp.{o,w2}"), "mlp")
    paths = ["h.layers.0.attn.o", "h.layers.0.mlp.w2.weight", "h.layers.1.attn.o"]
    paths += ["h.layers.1.mlp.ox", "layers.1.mlp.o"]
    assert [*match_joint_sums([joint], paths)] == [(joint, "h.layers.0", {"attn.o", "mlp.w2"})]
    assert joint.match_place("mlp")
    assert not joint.match_place("mlp.o")


def test_a_summand_counts_for_the_first_sum_that_has_two() -> None:
    every, some = JointSum("layers.*", ("o", "e", "s"), "s"), JointSum("layers.*", ("e", "s"), "s")
    paths = [f"layers.0.{name}" for name in "oes"] + ["layers.1.e", "layers.1.s"]
    assert [*match_joint_sums([some, every], paths)] == [
        (some, "layers.0", {"e", "s"}), (some, "layers.1", {"e", "s"}),
    ]  # fmt: skip
    assert [*match_joint_sums([every, some], paths)] == [
        (every, "layers.0", {*"oes"}), (every, "layers.1", {"e", "s"}),
    ]  # fmt: skip


def test_a_part_s_joint_sums_are_in_its_own_module() -> None:
    sample = next(each for each in list_samples() if each.name == "cohere2_vision")
    config = sample.stored_config
    (joint,) = compose_recipe(find_recipe(config), config).joint_sums
    names = ("self_attn.o_proj", "mlp.down_proj")
    text = [f"model.language_model.layers.0.{name}" for name in names]
    tower = [f"model.vision_tower.layers.0.{name}" for name in names]
    matches = [*match_joint_sums([joint], [*text, *tower])]
    assert matches == [(joint, "model.language_model.layers.0", {*names})]
    assert joint == replace(joint, when=())


NOTHING_TO_JOIN = {  # of a recipe whose other samples have: no shared experts
    "beam", "qwen3_moe", "mellum", "qwen3_moe-unsuited-width", "granitemoe", "youtu", "minicpm3",
    "granitemoehybrid-dense", "qwen3_5_text", "qwen3_5", "qwen3_vl_moe", "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "muse_glimmer", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker",
}  # fmt: skip


@pytest.mark.slow
def test_every_joint_sum_of_a_recipe_saves_a_sum(tmp_path: Path) -> None:
    joint_sums = {}
    for sample in list_samples():
        config = sample.stored_config
        if compose_recipe(find_recipe(config), config).joint_sums:
            folder = make_sample(sample, tmp_path / sample.name)
            joint_sums[sample.name] = shardkit.plan(str(folder), 2).collectives.joint
    assert {name for name, joint in joint_sums.items() if not joint} == NOTHING_TO_JOIN
