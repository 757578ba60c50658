"""How small an error of one tensor on one rank is caught: one unit in the last place in 16 bits."""

from pathlib import Path

import numpy as np
import pytest

from shardkit.shards import Manifest
from shardkit.verification.block_check import check_blocks
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

RANK = 1
TENSORS = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
)


def change_tensor(shards: Path, manifest: Manifest, name: str, is_wide: bool) -> None:
    """Change every number of a rank's tensor on disk: by 1e-5 of it, or by the last bit."""
    file = manifest.ranks[RANK]
    part = manifest.placements[name].shard_spec(manifest.mesh.rank(RANK))
    assert part is not None
    shape = (part.nbytes // (4 if is_wide else 2),)
    values: np.ndarray = np.memmap(
        shards / file.name, np.float32 if is_wide else np.uint16, "r+",
        file.pieces[name].offset, shape,
    )  # fmt: skip
    if is_wide:
        values *= 1 + 1e-5 * np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    else:
        values ^= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_small_error_of_one_tensor_on_one_rank_is_caught(
    name: str, dtype: str, tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source", dtype)
    manifest = cut(source, tmp_path / "shards", 2)
    assert check_blocks(tmp_path / "shards", manifest, source).verdict == "passed"
    change_tensor(tmp_path / "shards", manifest, name, dtype == "float32")
    found = check_blocks(tmp_path / "shards", manifest, source)
    assert found.verdict == "failed"
    assert " in float32: error" in found.faults[0]
    if "k_proj" in name:
        assert f"{name.removesuffix('.weight')}, on rank {RANK}" in found.faults[1]
