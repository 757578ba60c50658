"""The benchmarks of a GPU, as far as a CPU can run them."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_decode, gpu_load, gpu_nccl
from tests.helpers.command_line import environment

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200,
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [gpu_decode, gpu_load, gpu_nccl])
def test_without_a_gpu_they_are_refused_in_one_line(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == "Error: torch sees no CUDA device; this benchmark is of a GPU"


def test_a_token_reads_all_weights_but_the_embeddings(tmp_path: Path) -> None:
    nbytes = gpu.make_model(tmp_path, TINY, "cpu")
    attention, mlp, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96, 2 * 64
    assert nbytes == 2 * (2 * (attention + mlp + norms) + 64 + 200 * 64)
    stored = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors"))
    assert nbytes + 2 * 200 * 64 < stored < nbytes + 2 * 200 * 64 + 10_000


def test_copies_are_measured() -> None:
    cpu = torch.device("cpu")
    assert gpu.measure_copy(cpu, 1 << 20, 3) > 0
    assert gpu.measure_upload(cpu, 1 << 20, 3) > 0


def test_a_fraction_is_the_bytes_that_are_read_over_those_that_can_be() -> None:
    runs = [{"batch": 4, "token_seconds": {"median": 0.5}}]
    report = {"contenders": [{"name": "shardkit tp 1", "runs": runs}]}
    assert gpu_decode.list_fractions(report, 100, 400.0) == [
        {"name": "shardkit tp 1", "batch": 4, "tokens_per_second": 8.0, "fraction": 0.5}
    ]
    loads = [{"seconds": s, "bytes": 8e9, "upload": 4e9} for s in (4.0, 2.0, 8.0)]
    assert gpu_load.summarize_loads(loads) == {
        "seconds": 4.0, "gb_per_second": 2.0, "fraction": 0.5, "worst": 0.25,
    }  # fmt: skip


def test_their_models_have_one_and_eight_billion_parameters() -> None:
    import transformers

    for size, billions in (("1b", 1.5), ("8b", 8.0)):
        config = transformers.LlamaConfig(**gpu.COMMON, **gpu.SIZES[size])
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        assert round(model.num_parameters() / 1e9, 1) == billions


@pytest.mark.slow
def test_decoding_is_measured_on_a_cpu(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "4"]
    report = gpu_decode.measure(tmp_path, TINY, "cpu", options, 1 << 20)
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "unsharded", "shardkit tp 1", "unsharded compiled", "shardkit tp 1 compiled",
    ]  # fmt: skip


def test_loading_is_measured_on_a_cpu(tmp_path: Path) -> None:
    gpu.make_model(tmp_path, TINY, "cpu")
    for way in (gpu_load.OURS, gpu_load.THEIRS):
        used = gpu_load.run_load(way, tmp_path, "cpu")
        assert used["seconds"] > 0
        assert used["bytes"] == gpu.make_model(tmp_path / way, TINY, "cpu") + 2 * 200 * 64


@pytest.mark.slow
@pytest.mark.torchrun
def test_loads_and_one_rank_of_torchrun_run_as_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    assert gpu_nccl.compare(tmp_path / "one", "cpu") == ""
    report = gpu_load.measure(tmp_path / "two", TINY, "cpu", 1)
    assert report.keys() == {"shardkit", "transformers"}


def test_a_difference_over_a_process_group_is_found() -> None:
    alone = {"ids": [1], "backend": "", "right": True}
    started = {"ids": [1], "backend": "nccl", "right": True}
    compare = gpu_nccl.describe_difference
    assert compare(alone, started, "nccl") == ""
    assert compare(alone, {**started, "ids": [2]}, "nccl") == "the ids differ"
    assert compare(alone, alone, "nccl") == "the process group is none, not nccl"
    assert "changed its tensor" in compare(alone, {**started, "right": False}, "nccl")
