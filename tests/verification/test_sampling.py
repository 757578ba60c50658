"""A sample of blocks, and progress by block."""

from dataclasses import replace
from pathlib import Path

import torch

from shardkit.authoring.samples import make_sample
from shardkit.verification.block_check import check_blocks
from shardkit.verification.numerics_options import NumericsOptions
from tests.helpers.model_samples import VARIANTS
from tests.helpers.runtime_helpers import cut
from tests.verification.test_blocks import split_sample


def test_a_sample_skips_blocks_and_says_so(tmp_path: Path) -> None:
    llama = VARIANTS["llama"]
    sample = replace(llama, config={**llama.config, "num_hidden_layers": 9})
    source = make_sample(sample, tmp_path / "source", torch.bfloat16)
    manifest = cut(source, tmp_path / "shards", 2)
    done: list[tuple[int, int]] = []
    options = NumericsOptions(sample=2, seed=7, progress=lambda *numbers: done.append(numbers))
    found = check_blocks(tmp_path / "shards", manifest, source, None, options)
    assert found.verdict == "passed", found.faults
    assert "a sample of 8 of 13 blocks, by seed 7" in found.summary
    blocks = [each["block"] for each in found.numbers["by_block"]["bfloat16"]]  # type: ignore[index]
    assert {"model.layers.0", "model.layers.8", "lm_head"} <= {*blocks}
    assert len([name for name in blocks if "layers" in name]) == 4
    every = check_blocks(tmp_path / "shards", manifest, source)
    assert found.numbers["bytes_read"] < every.numbers["bytes_read"]  # type: ignore[operator]
    assert [count for count, _ in done] == list(range(1, len(done) + 1))
    assert all(count <= total for count, total in done)
    assert done[-1][1] == 14 * 4 * 3


def test_a_sample_of_a_mixture_of_kinds_has_one_of_each(tmp_path: Path) -> None:
    split = split_sample("bamba", tmp_path, 2)
    found = check_blocks(
        split.shards, split.manifest, split.source, None, NumericsOptions(sample=0)
    )
    assert found.verdict == "passed", found.faults
    assert found.numbers["sample"]["blocks"] >= 2  # type: ignore[index]
