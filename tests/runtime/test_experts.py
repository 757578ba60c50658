"""Experts as wide as a rank has them: the kernel that takes them, and what the user is told."""

from pathlib import Path

import pytest
import torch

from shardkit import runtime
from shardkit.authoring.masked_sum import load_reference
from shardkit.runtime.layers.experts import choose_expert_kernel, describe_slow_experts
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

SAMPLE = "qwen3_moe-unsuited-width"  # 40 wide: 160 bytes in float32, 80 in bfloat16, 10 a rank at 4


@pytest.mark.parametrize(
    ("tp_size", "dtype", "told"),
    [
        pytest.param(2, "float32", "", marks=pytest.mark.slow),  # 20 wide: 80 bytes
        pytest.param(2, "bfloat16", "20 wide in bfloat16", marks=pytest.mark.slow),
        pytest.param(4, "float32", "10 wide in float32", marks=pytest.mark.slow),
    ],
)
def test_experts_run_whatever_their_local_width_and_the_user_is_told(
    tp_size: int, dtype: str, told: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    cut(make(SAMPLE, tmp_path / "whole", dtype), tmp_path / "shards", tp_size)
    with runtime.launch(tmp_path / "shards") as engine:
        logits = engine.logits([5, 6, 7])
    found = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert found == ([describe_slow_experts([told])] if told else [])
    assert logits.dtype == getattr(torch, dtype)
    assert torch.isfinite(logits).all()


def test_the_plain_loop_is_chosen_only_where_it_must_be(tmp_path: Path) -> None:
    model = load_reference(make(SAMPLE, tmp_path / "whole"))
    assert choose_expert_kernel(model) == ""
    assert model.config._experts_implementation == "grouped_mm"
    assert choose_expert_kernel(model.double()) == "40 wide in float64"
    assert model.config._experts_implementation == "eager"


def test_ranks_of_unequal_widths_are_told_of_together() -> None:
    line = describe_slow_experts(["55 wide in float32", "54 wide in float32"])
    assert line.startswith("experts 55 wide in float32 and 54 wide in float32 do not suit")


def test_the_plain_loop_is_chosen_in_layers_with_a_config_of_their_own(tmp_path: Path) -> None:
    model = load_reference(make("dots3_note", tmp_path / "whole")).double()
    experts = [module for module in model.modules() if hasattr(module, "has_gate")]
    assert any(module.config is not model.config.vision_config for module in experts)
    assert choose_expert_kernel(model)
    assert {module.config._experts_implementation for module in experts} == {"eager"}
