"""Quantized models over real ranks; `recipes/proofs/FORMATS.md` has all that is proven."""

from pathlib import Path

import pytest

from shardkit.authoring.format_check import FAULTS, inject_faults, prove_format
from shardkit.authoring.format_samples import list_format_models, list_format_samples
from shardkit.authoring.rank_pool import RankPool

SAMPLES = {sample.name: sample for sample in list_format_samples()}
MODELS = {model.name: model for model in list_format_models()}


@pytest.mark.parametrize(
    ("sample", "model", "verdicts"),
    [
        pytest.param(  # 576 rows in blocks of 128
            "fp8-block", "grouped-heads", ["proven"] * 2, marks=pytest.mark.slow
        ),
        pytest.param(  # over 3, ranks share blocks of heads
            "fp8-block", "latent-attention", ["proven"] * 4, marks=pytest.mark.slow
        ),
        ("gptq-desc-act", "fused", ["proven"] * 2),
        ("mxfp4", "stacked-experts", ["proven"] * 4),  # 5 groups of 32
    ],
)
def test_a_model_in_a_format_is_what_it_is_unsharded(
    sample: str, model: str, verdicts: list[str], rank_pool: RankPool, tmp_path: Path
) -> None:
    proofs = list(prove_format(MODELS[model], SAMPLES[sample], rank_pool, tmp_path, (2, 3)))
    assert [proof.verdict for proof in proofs] == verdicts, proofs


def test_a_wrong_shard_is_found_by_its_numbers(rank_pool: RankPool, tmp_path: Path) -> None:
    faults = list(inject_faults(MODELS["experts"], SAMPLES["modelopt-nvfp4"], rank_pool, tmp_path))
    assert {fault.fault for fault in faults} <= FAULTS.keys()
    assert len(faults) == 5
    for fault in faults:
        assert "tensors to blame" in fault.finding
