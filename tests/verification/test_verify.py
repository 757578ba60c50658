"""Every level of verify: clean shards pass, and each planted fault is caught where it should be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shardkit
from shardkit.authoring.rank_pool import RankPool
from shardkit.checkpoint import open_checkpoint
from shardkit.layout import spans as layout
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.shards.reader import ShardedCheckpoint
from shardkit.verification import Check, check_files, check_weights
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from tests.helpers.layout_faults import LAYOUT_FAULTS, SEQUENTIAL_SUMS_JOINED
from tests.helpers.model_samples import SampleFolder, make
from tests.helpers.runtime_helpers import altered, cut


def quiet(_: int) -> None:
    """No progress bar."""


@pytest.fixture
def ranks(rank_pool: RankPool) -> RankProcesses:
    return rank_pool.of(2)


@pytest.fixture
def four_ranks(rank_pool: RankPool) -> RankProcesses:
    return rank_pool.of(4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SampleFolder:
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else make(name, path)

    return get


def weights(shards: Path, source: Path) -> Check:
    with open_checkpoint(str(source)) as checkpoint:
        return check_weights(shards, checkpoint, quiet)


def numerics(shards: Path, source: Path, ranks: RankProcesses) -> Check:
    with ShardedCheckpoint(shards) as opened:
        manifest = opened.manifest
    return check_numerics(shards, manifest, source, ShardedModel(ranks))


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_a_wrong_layout_passes_as_bytes_and_fails_as_numbers(
    fault: str, models: SampleFolder, ranks: RankProcesses, tmp_path: Path
) -> None:
    name, right, wrong, module, tensor = LAYOUT_FAULTS[fault]
    source = models(name)
    cut(source, tmp_path / "shards", 2, altered(name, tmp_path, (right, wrong)))
    assert check_files(tmp_path / "shards", quiet).verdict == "passed"
    assert weights(tmp_path / "shards", source).verdict == "passed"
    found = numerics(tmp_path / "shards", source, ranks)
    assert found.verdict == "failed"
    assert f"first diverging module: {module}" in found.faults[1]
    assert tensor in found.faults[1]


def test_sums_made_together_of_what_a_model_does_not_just_add_fail(
    models: SampleFolder, ranks: RankProcesses, tmp_path: Path
) -> None:
    recipe = altered("llama", tmp_path, SEQUENTIAL_SUMS_JOINED)
    cut(models("llama"), tmp_path / "shards", 2, recipe)
    check = numerics(tmp_path / "shards", models("llama"), ranks)
    assert check.verdict == "failed"
    assert "`joint_sums` add up what the model does not just add" in check.faults[1]


ROW_BIAS_ON_EVERY_RANK = """
import torch.nn.functional as F
from shardkit.runtime.layers import linear

def forward(self, x):
    return self.group.all_reduce(F.linear(x, self.weight, self.bias))

linear.RowParallelLinear.forward = forward
"""


@pytest.mark.slow
def test_a_row_bias_added_on_every_rank_is_named(
    models: SampleFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models("bert")
    cut(source, tmp_path / "shards", 2)
    (tmp_path / "sitecustomize.py").write_text(ROW_BIAS_ON_EVERY_RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with RankProcesses(2) as faulty:
        found = numerics(tmp_path / "shards", source, faulty)
    assert found.verdict == "failed"
    assert "module: bert.encoder.layer.0.attention.output.dense" in found.faults[1]
    assert "attention.output.dense.bias (row)" in found.faults[1]


def test_rotated_kv_replicas_are_found_on_their_rank(
    models: SampleFolder, four_ranks: RankProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models("llama-two-kv-heads")
    right = layout.held_units

    def rotated(section: layout.Section, tp_rank: int, tp_size: int) -> Any:
        if section.shared_by and tp_size == 4:
            return right(section, (tp_rank + 1) % tp_size, tp_size)
        return right(section, tp_rank, tp_size)

    with monkeypatch.context() as planted:
        planted.setattr(layout, "held_units", rotated)
        cut(source, tmp_path / "shards", 4)
    assert check_files(tmp_path / "shards", quiet).verdict == "passed"
    found = weights(tmp_path / "shards", source)
    assert found.verdict == "failed"
    assert found.faults[0].startswith("rank 1: model.layers.0.self_attn.k_proj.weight: differs")
    run = numerics(tmp_path / "shards", source, four_ranks)
    assert run.verdict == "failed"
    assert "module: model.layers.0.self_attn.k_proj, on rank 1" in run.faults[1]


def test_two_ranks_files_swapped_fail_as_files(models: SampleFolder, tmp_path: Path) -> None:
    cut(models("llama"), tmp_path / "shards", 2)
    first, second = (tmp_path / "shards" / f"rank-0000{r}-of-00002.safetensors" for r in (0, 1))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    found = check_files(tmp_path / "shards", quiet)
    assert found.verdict == "failed"
    assert "rank-00000-of-00002.safetensors: is the file of rank '1', renamed" in found.faults[0]


def test_swapped_experts_are_named_by_weights_and_by_numerics(
    models: SampleFolder, ranks: RankProcesses, tmp_path: Path
) -> None:
    source = models("mixtral")
    swapped = swap_experts(source, tmp_path / "swapped")
    cut(swapped, tmp_path / "shards", 2)
    assert check_files(tmp_path / "shards", quiet).verdict == "passed"
    found = weights(tmp_path / "shards", source)
    assert found.verdict == "failed"
    assert "layers.1.block_sparse_moe.experts.0.w1.weight: differs" in found.faults[0]
    run = numerics(tmp_path / "shards", source, ranks)
    assert run.verdict == "failed"
    assert "module: model.layers.1.mlp.experts" in run.faults[1]


def swap_experts(source: Path, out: Path) -> Path:
    """A copy in which layer 1's experts 0 and 1 have each other's w1."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_one_flipped_bit_is_located_to_rank_and_tensor(
    at: float, models: SampleFolder, tmp_path: Path
) -> None:
    manifest = cut(models("llama"), tmp_path / "shards", 2)
    path = tmp_path / "shards" / manifest.ranks[1].name
    data = bytearray(path.read_bytes())
    where = int(len(data) * at)
    data[where] ^= 1
    path.write_bytes(data)
    found = check_files(tmp_path / "shards", quiet)
    assert found.verdict == "failed"
    starts = {piece.offset: name for name, piece in manifest.ranks[1].pieces.items()}
    before = [offset for offset in starts if offset <= where]
    if before:
        assert f"rank 1: {starts[max(before)]}: damaged" in found.faults[0]
    else:
        assert "rank-00001-of-00002.safetensors" in found.faults[0]


def test_a_nan_on_one_rank_fails(
    models: SampleFolder, ranks: RankProcesses, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    cut(source, tmp_path / "shards", 2)
    assert numerics(tmp_path / "shards", models("llama"), ranks).verdict == "failed"


def command(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                  "--rdzv-endpoint", "127.0.0.1:0", "-m"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(shardkit.__file__).parents[1]),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run(
        [*start, "shardkit", *arguments],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_reports_every_level_as_json(models: SampleFolder, tmp_path: Path) -> None:
    cut(models("gpt2"), tmp_path / "shards", 2)
    done = command("verify", str(tmp_path / "shards"), "--against", str(models("gpt2")), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert [c["verdict"] for c in report["checks"]] == ["passed"] * 3
    assert report["checks"][2]["numbers"]["greedy"] == "equal"


def test_without_a_source_nothing_unproven_is_called_passed(
    models: SampleFolder, tmp_path: Path
) -> None:
    cut(models("gpt2"), tmp_path / "shards", 2)
    done = command("verify", str(tmp_path / "shards"), "--json")
    assert done.returncode == 0
    verdicts = [c["verdict"] for c in json.loads(done.stdout)["checks"]]
    assert verdicts == ["passed", "not run", "not run"]


def test_the_command_exits_with_4_and_names_the_module(
    models: SampleFolder, tmp_path: Path
) -> None:
    recipe = altered("gpt2", tmp_path, ('"3 heads"', '"heads 3"'))
    cut(models("gpt2"), tmp_path / "shards", 2, recipe)
    done = command("verify", str(tmp_path / "shards"), "--against", str(models("gpt2")))
    assert done.returncode == 4
    assert "first diverging module: transformer.h.0.attn.c_proj" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.torchrun
def test_it_verifies_under_torchrun(models: SampleFolder, tmp_path: Path) -> None:
    source = models("llama")
    cut(source, tmp_path / "right", 2)
    done = command("verify", str(tmp_path / "right"), "--against", str(source), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "numerics  passed" in done.stdout


@pytest.mark.torchrun
def test_it_finds_a_wrong_layout_under_torchrun(models: SampleFolder, tmp_path: Path) -> None:
    source = models("llama")
    recipe = altered("llama", tmp_path, ('offset}" = "heads"', 'offset}" = "2 heads"'))
    cut(source, tmp_path / "wrong", 2, recipe)
    done = command("verify", str(tmp_path / "wrong"), "--against", str(source), ranks=2)
    assert done.returncode != 0
    assert "numerics  failed" in done.stdout
    assert "first diverging module" in done.stdout


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_damaged_file_under_torchrun_ends_every_rank(
    models: SampleFolder, tmp_path: Path
) -> None:
    source = models("llama")
    manifest = cut(source, tmp_path / "shards", 2)
    path = tmp_path / "shards" / manifest.ranks[0].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = command("verify", str(tmp_path / "shards"), "--against", str(source), ranks=2)
    assert done.returncode != 0
    assert "damaged between byte" in done.stdout
