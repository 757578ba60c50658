"""Quantized weights stay as they are stored, and compute what weights computed at load do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import PreTrainedModel

from shardkit import runtime
from shardkit.authoring.format_samples import (
    FormatSample,
    list_format_models,
    list_format_samples,
    make_quantized,
)
from shardkit.authoring.rank_pool import RankPool
from shardkit.cli import main
from shardkit.errors import ShardkitError, UsageError
from shardkit.planning import Plan, summarize_plan
from shardkit.runtime import packed as packed_module
from shardkit.runtime.dequantize import StoredWeight, write_weight
from shardkit.runtime.engine.messages import forward_request, load_request, measure_request
from shardkit.runtime.load_options import LoadOptions
from shardkit.runtime.packed import PackedTensor, compute_tensor, iter_stored, pack_weight
from shardkit.runtime.packing import Dequantize, RecordLayout
from shardkit.runtime.usage import count_weight_bytes
from tests.helpers.runtime_helpers import cut
from tests.recipe.formats.test_arithmetic import make_weight

SAMPLES = {sample.name: sample for sample in list_format_samples()}
MODELS = {model.name: model for model in list_format_models()}
STACKED = {name for name, sample in SAMPLES.items() if sample.form.codes.follows_parameter}
# Every format, and every model in two of them.
CASES = [
    (name, "stacked-experts" if name in STACKED else "experts") for name in SAMPLES
] + [
    (name, model)
    for name in ("fp8-block", "pack-quantized-zero-points")
    for model in MODELS
    if model != "experts"
]  # fmt: skip
DEQUANTIZE: tuple[Dequantize, ...] = ("forward", "load")
IDS = torch.tensor([[5, 6, 7, 8, 9, 20, 30]])


def split(
    sample: str, model: str, folder: Path, tp_size: int = 1, expert_parallel: bool = False
) -> tuple[Path, Plan]:
    source = make_quantized(MODELS[model], SAMPLES[sample], folder / "source")
    shards = folder / "shards"
    return shards, cut(source, shards, tp_size, expert_parallel=expert_parallel).plan


def list_packed(model: PreTrainedModel) -> dict[str, PackedTensor]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, PackedTensor)}


def pack(sample: FormatSample, shape: tuple[int, ...], seed: int = 0) -> PackedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    quantized, tensors = make_weight(sample, weight.mT if sample.form.transposed else weight)
    parts = tuple((part, tensors[spec.name]) for part, spec in quantized.operands)
    return pack_weight(StoredWeight(quantized.scheme, parts), torch.float32)


@pytest.mark.filterwarnings("ignore:experts:RuntimeWarning")  # float64 has one kernel of them
@pytest.mark.parametrize(("sample", "model"), CASES)
def test_both_ways_compute_the_same_bits(sample: str, model: str, tmp_path: Path) -> None:
    shards, plan = split(sample, model, tmp_path)
    forward, load = (
        runtime.load(shards, dtype=torch.float64, dequantize=when) for when in DEQUANTIZE
    )
    weights, packed = dict(load.named_parameters()), list_packed(forward)
    assert packed
    assert not list_packed(load)
    for name, parameter in forward.named_parameters():
        assert torch.equal(compute_tensor(parameter), weights[name]), name
    with torch.inference_mode():
        assert torch.equal(forward(IDS).logits, load(IDS).logits)
    plain = sum(t.nbytes for n, t in load.state_dict().items() if n not in packed)
    stored = {t.data_ptr(): t.nbytes for p in packed.values() for t in iter_stored(p)}
    assert count_weight_bytes(forward) == plain + sum(stored.values())
    in_float32 = runtime.load(shards)  # as it is stored
    assert (count_weight_bytes(in_float32),) == summarize_plan(plan).loaded_bytes


@pytest.mark.parametrize(
    ("sample", "model", "expert_parallel"),
    [("gptq-desc-act", "fused", False), ("awq", "latent-attention", False)]
    + [("fp8-block", "experts", whole) for whole in (False, True)]
    + [("mxfp4", "stacked-experts", whole) for whole in (False, True)],
)
def test_both_ways_compute_the_same_bits_over_two_ranks(
    sample: str, model: str, expert_parallel: bool, rank_pool: RankPool, tmp_path: Path
) -> None:
    shards, plan = split(sample, model, tmp_path, 2, expert_parallel)
    ranks, logits = rank_pool.of(2), []
    for when in DEQUANTIZE:
        ranks.request(load_request(shards, LoadOptions(torch.float64, False, when)))
        logits.append(ranks.request(forward_request({"input_ids": IDS}))[0].tensors["logits"])
    assert torch.equal(*logits)
    ranks.request(load_request(shards))
    usages = [r.header["usage"] for r in ranks.request(measure_request({"input_ids": IDS}, {}))]
    assert tuple(each["weight_bytes"] for each in usages) == summarize_plan(plan).loaded_bytes


def test_a_dense_model_computes_the_same_bits_in_its_own_dtype(tmp_path: Path) -> None:
    shards, _ = split("pack-quantized", "grouped-heads", tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        forward = runtime.load(shards, dtype=dtype)
        load = runtime.load(shards, dtype=dtype, dequantize="load")
        assert torch.equal(forward(IDS).logits, load(IDS).logits)  # with gradients enabled
        with torch.inference_mode():
            a, b = (m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (forward, load))
        assert torch.equal(a, b)


def test_only_the_experts_that_are_routed_to_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = split("fp8-block", "experts", tmp_path)
    model = runtime.load(shards)
    written: list[tuple[int, ...]] = []

    def count(weight: StoredWeight, out: torch.Tensor) -> None:
        written.append(weight.shape)
        write_weight(weight, out)

    monkeypatch.setattr(packed_module, "write_weight", count)
    with torch.inference_mode():
        model(IDS[:, :1])
    layers, experts_per_token, width = 2, 2, 384
    gates_and_ups = written.count((width, 256))
    assert gates_and_ups == 2 * layers * experts_per_token
    assert written.count((256, width)) == layers * experts_per_token
    assert len(written) == layers * (4 + 3 * experts_per_token)


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda tensors: torch.stack(tensors),
        lambda tensors: torch.cat([torch.stack(tensors[:2]), torch.stack(tensors[2:])], 1),
        lambda tensors: torch.stack(tensors).transpose(1, 2).contiguous(),
        lambda tensors: torch.stack(tensors).to(torch.bfloat16),
        lambda tensors: torch.stack(tensors, 1),
        lambda tensors: torch.stack(tensors)[:, 100:160],  # inside of a block
        lambda tensors: torch.cat(tensors),
        lambda tensors: torch.cat([tensors[0], torch.ones(3, 128)]),
        lambda tensors: torch.chunk(torch.cat(tensors), 3)[1],
        lambda tensors: torch.chunk(tensors[0], 3)[1].contiguous(),
        lambda tensors: torch.split(tensors[0], [128, 64])[1],
        lambda tensors: torch.split(tensors[0], [100, 92])[1],  # inside of a block
        lambda tensors: torch.split(tensors[0], [100, 28], 1)[1],
        lambda tensors: tensors[0].view(4, 24, 2, 128).transpose(1, 2).reshape(192, 128),
    ],
)
@pytest.mark.parametrize("sample", ["fp8-block", "awq", "pack-quantized-zero-points"])
def test_what_a_conversion_does_is_recorded(
    sample: str, rearrange: Callable[[list[torch.Tensor]], torch.Tensor]
) -> None:
    packed = [pack(SAMPLES[sample], (192, 128), seed) for seed in range(4)]
    expected = rearrange([compute_tensor(each) for each in packed])
    with RecordLayout():  # type: ignore[no-untyped-call]
        recorded = rearrange([*packed])
    assert isinstance(recorded, PackedTensor)
    assert recorded.shape == expected.shape
    assert recorded.dtype == expected.dtype
    assert torch.equal(compute_tensor(recorded), expected)
    for index in (0, len(expected) - 1, -1):
        assert torch.equal(recorded[index], expected[index])
    with pytest.raises(IndexError, match="out of bounds"):
        recorded[len(expected)]


def test_one_of_a_stack_of_excerpts_is_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that share blocks with other ranks, of which each is part of a weight."""
    packed = [pack(SAMPLES["fp8-block"], (192, 128), seed) for seed in range(4)]
    expected = compute_tensor(packed[2])[64:128]
    with RecordLayout():  # type: ignore[no-untyped-call]
        stack = torch.stack([*packed])[:, 64:128]
    written: list[StoredWeight] = []

    def count(weight: StoredWeight, out: torch.Tensor) -> None:
        written.append(weight)
        write_weight(weight, out)

    monkeypatch.setattr(packed_module, "write_weight", count)
    assert torch.equal(stack[2], expected)
    assert len(written) == 1


@pytest.mark.parametrize("sample", SAMPLES)
def test_one_of_a_stack_is_computed_alone(sample: str) -> None:
    weight = pack(SAMPLES[sample], (3, 64, 128))
    whole = compute_tensor(weight)
    for index in range(3):
        assert torch.equal(weight[torch.tensor(index)], whole[index])
    with torch.inference_mode():
        assert torch.equal(weight[2], whole[2])
        assert torch.equal(weight.mT, whole.mT)


def test_a_module_does_not_see_that_its_weight_is_packed() -> None:
    packed, x = pack(SAMPLES["fp8-block"], (192, 128)), torch.randn(2, 3, 128)
    layer = nn.Linear(128, 192)
    expected = nn.functional.linear(x, compute_tensor(packed), layer.bias)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    assert isinstance(layer.weight, nn.Parameter)
    assert (layer.weight.shape, layer.weight.device.type) == ((192, 128), "cpu")
    for same in (layer, copy.deepcopy(layer), layer.to("cpu")):
        assert torch.equal(same(x), expected)
        assert isinstance(same.weight, PackedTensor)
    state = layer.state_dict()
    assert torch.equal(compute_tensor(state["weight"]), compute_tensor(packed))
    state_memory = {stored.data_ptr() for stored in iter_stored(state["weight"])}
    assert state_memory == {stored.data_ptr() for stored in iter_stored(packed)}
    assert "stored in" in repr(layer.weight)
    wide = copy.deepcopy(layer).double()
    assert torch.equal(wide.weight + 0, compute_tensor(packed).double())
    moved = copy.deepcopy(layer).to("meta").weight
    assert {stored.device.type for stored in iter_stored(moved)} == {moved.device.type} == {"meta"}


def test_writing_to_a_packed_weight_is_an_error() -> None:
    packed = pack(SAMPLES["fp8-block"], (192, 128))
    writes: list[Callable[[], Any]] = [
        lambda: packed.mul_(2),
        lambda: packed.zero_(),
        lambda: packed.__setitem__(0, 1.0),
        lambda: torch.add(packed, 1, out=packed),
        lambda: setattr(packed, "data", torch.ones(192, 128)),
    ]
    for write in writes:
        with pytest.raises(ShardkitError, match='dequantize="load"'):
            write()
    assert torch.equal(
        torch.ones(192, 128).copy_(packed), compute_tensor(packed)
    )  # reading is none


def test_no_other_word_is_taken_for_when_to_dequantize(tmp_path: Path) -> None:
    words: Any = "lod"
    for call in (runtime.load, runtime.launch):
        with pytest.raises(UsageError) as caught:
            call(tmp_path, dequantize=words)
        assert str(caught.value) == 'dequantize is \'lod\'; it must be "forward" or "load"'
    result = CliRunner().invoke(main, ["generate", str(tmp_path), "1", "--dequantize", "lod"])
    assert result.exit_code == 2
    assert "'lod' is not one of 'forward', 'load'" in result.output


@pytest.mark.slow
def test_generate_computes_weights_when_it_is_said(tmp_path: Path) -> None:
    shards, _ = split("gptq", "heads-of-64", tmp_path)
    outputs = [
        CliRunner().invoke(
            main, ["generate", str(shards), "5 6", "--max-new-tokens", "4", *options]
        )
        for options in ([], ["--dequantize", "load"])
    ]
    assert [result.exit_code for result in outputs] == [0, 0], outputs[0].output
    assert outputs[0].output == outputs[1].output != ""
