"""What memory there is and is needed: limits of containers, refusals with the number that would do,
and a model of many blocks that is verified in the memory of one."""

import json
import math
import resource
import subprocess
import sys
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from shardkit.errors import UsageError
from shardkit.output.available_memory import measure_available_memory, parse_size
from shardkit.shards.manifest import Manifest
from shardkit.verification import NumericsOptions, verify
from shardkit.verification.block_check import check_blocks
from shardkit.verification.block_runs import TurnRanks
from shardkit.verification.memory import (
    PROCESS_BYTES,
    THREAD_BYTES,
    TOKENS,
    count_kept_keys,
    estimate_turns,
    name_block,
)
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("80G", 80 * 10**9), ("1.5 GB", 1_500_000_000), ("512MiB", 512 * MIB), ("7", 7), ("2k", 2000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1 i", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it as 80G"):
        parse_size(text)


def fake_process(folder: Path, cgroup: str, free: int) -> Path:
    process = folder / "proc" / "self"
    process.mkdir(parents=True)
    (process.parent / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {free // 1024} kB\n")
    (process / "cgroup").write_text(cgroup)
    return process


def test_the_tightest_cgroup_of_version_2_counts(tmp_path: Path) -> None:
    process = fake_process(tmp_path, "0::/pod/box\n", 900 * MIB)
    for name, limit, used, cache in (("pod", 500 * MIB, 300 * MIB, 50 * MIB), ("pod/box", 0, 1, 0)):
        group = tmp_path / "cg" / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit or 'max'}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    assert measure_available_memory(process, tmp_path / "cg") == 250 * MIB


def test_a_cgroup_of_version_1_counts_unless_it_has_no_limit(tmp_path: Path) -> None:
    process = fake_process(tmp_path, "5:cpu:/x\n4:memory:/box\n", 900 * MIB)
    group = tmp_path / "cg" / "memory" / "box"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(str(300 * MIB))
    (group / "memory.usage_in_bytes").write_text(str(100 * MIB))
    (group / "memory.stat").write_text(f"total_inactive_file {10 * MIB}\n")
    assert measure_available_memory(process, tmp_path / "cg") == 210 * MIB
    (group / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert measure_available_memory(process, tmp_path / "cg") == 900 * MIB


def test_the_address_space_that_is_allowed_counts() -> None:
    before = measure_available_memory()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]
    resource.setrlimit(resource.RLIMIT_AS, (int(status) * 1024 + 64 * MIB, limits[1]))
    try:
        assert measure_available_memory() <= 64 * MIB < before
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_block_is_named_by_the_first_number() -> None:
    assert name_block("model.layers.3.mlp.experts.5.w1.weight") == "model.layers.3"
    assert name_block("lm_head.weight") == "lm_head"


def test_what_does_not_fit_is_refused_with_the_number_that_would(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    manifest = cut(source, tmp_path / "shards", 2)
    needed = -(-estimate_turns(tmp_path / "shards", manifest) // 10**6)
    with pytest.raises(UsageError, match=f"--max-memory {needed}M"):
        verify(tmp_path / "shards", source, numerics=NumericsOptions(max_memory=10**7))
    with pytest.raises(UsageError, match="real ranks needs"):
        verify(tmp_path / "shards", source, numerics=NumericsOptions("real", needed * 10**6))
    options = NumericsOptions(max_memory=needed * 10**6)
    report = verify(tmp_path / "shards", source, numerics=options)
    assert report is not None
    assert report.passed
    assert report.checks[-1].numbers["ranks"] == "turns"


VERIFY_AND_MEASURE = """
import sys
from pathlib import Path
from shardkit.shards import read_manifest
from shardkit.verification.block_check import check_blocks
from shardkit.verification.memory import estimate_turns
shards, source = map(Path, sys.argv[1:])
manifest = read_manifest(shards)
check = check_blocks(shards, manifest, source)
assert check.verdict == "passed", check.faults
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(peak, estimate_turns(shards, manifest), check.numbers["peak_weight_bytes"])
"""
DEEP = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 128, "num_hidden_layers": 7,
        "max_position_embeddings": 64}  # fmt: skip
NARROW = {"hidden_size": 256, "intermediate_size": 512}


def test_many_blocks_take_the_memory_of_one(tmp_path: Path) -> None:
    """A model in 16 bits that would take more memory than that in the reference's dtype."""
    source = write_llama(tmp_path / "source", DEEP)
    manifest = cut(source, tmp_path / "shards", 2)
    arguments = [sys.executable, "-c", VERIFY_AND_MEASURE, str(tmp_path / "shards"), str(source)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    peak, needed, weights = map(int, done.stdout.split()[-3:])
    assert weights <= needed - PROCESS_BYTES
    assert weights <= 2.5 * measure_largest_block(manifest)
    assert peak <= needed < 8 * sum(p.spec.nbytes // 2 for p in manifest.plan.weights)


def measure_largest_block(manifest: Manifest) -> int:
    """Bytes of the largest block in float64."""
    sizes: dict[str, int] = defaultdict(int)
    for placement in manifest.plan.weights:
        sizes[name_block(placement.spec.name)] += 8 * math.prod(placement.spec.shape)
    return max(sizes.values())


def test_more_blocks_hold_no_more_weights(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 5):
        folder = tmp_path / str(layers)
        folder.mkdir()
        source = write_llama(folder / "source", {**DEEP, **NARROW, "num_hidden_layers": layers})
        check = check_blocks(folder / "shards", cut(source, folder / "shards", 2), source)
        assert check.verdict == "passed"
        peaks.append(check.numbers["peak_weight_bytes"])
    assert peaks[0] == peaks[1]


def test_modules_of_ranks_are_there_only_while_these_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 bits there are ranks in two dtypes: never more models than ranks of one."""
    source = make("llama", tmp_path / "source", "bfloat16")
    manifest = cut(source, tmp_path / "shards", 4)
    models: list[weakref.ref[object]] = []
    alive: list[int] = []
    prepare = TurnRanks._prepare

    def prepare_and_count(self: TurnRanks, *args: Any) -> Any:
        streamed = prepare(self, *args)
        models.append(weakref.ref(streamed.model))
        alive.append(sum(model() is not None for model in models))
        return streamed

    monkeypatch.setattr(TurnRanks, "_prepare", prepare_and_count)
    assert check_blocks(tmp_path / "shards", manifest, source).verdict == "passed"
    assert len(alive) == 5 * 4  # each alone at first, and two passes in each of two dtypes
    assert max(alive) == 4


def test_a_rank_more_takes_its_modules_and_what_it_computes_with(tmp_path: Path) -> None:
    source, needed = make("llama", tmp_path / "source"), []
    for tp_size in (1, 2, 4):
        manifest = cut(source, tmp_path / str(tp_size), tp_size)
        needed.append(estimate_turns(tmp_path / str(tp_size), manifest))
    assert needed[2] - needed[1] == 2 * (needed[1] - needed[0]) > 2 * THREAD_BYTES


def write_llama(folder: Path, changes: dict[str, int]) -> Path:
    """A checkpoint of random weights, of one block's worth of random numbers."""
    config = LlamaConfig(architectures=["LlamaModel"], dtype="bfloat16", **changes)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaModel(config).state_dict().items()}
    noise = torch.randn(max(shape.numel() for shape in shapes.values())) * 0.02
    tensors = {n: noise[: s.numel()].reshape(s).bfloat16() for n, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def test_keys_of_all_unsharded_models_count(tmp_path: Path) -> None:
    """A key and a value of each kv head and layer: in float64 and float32, and in 16 bits, too."""
    for dtype, width in (("float32", 8 + 4), ("bfloat16", 8 + 4 + 2)):
        source = make("llama-two-kv-heads", tmp_path / f"source-{dtype}", dtype)
        manifest = cut(source, tmp_path / f"shards-{dtype}", 2)
        config = json.loads((source / "config.json").read_text())
        size = 2 * config["num_hidden_layers"] * config["num_key_value_heads"]
        size *= config["hidden_size"] // config["num_attention_heads"]
        assert count_kept_keys(manifest, config) == TOKENS * size * width
