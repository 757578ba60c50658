"""Weights computed from stored tensors: by the runtime, and by the reference's own way."""

import pytest
import torch

from shardkit.authoring.format_samples import FormatSample, list_format_samples
from shardkit.authoring.quantize import quantize_weight
from shardkit.dtypes import BY_TORCH_NAME, DTYPES, torch_name
from shardkit.errors import RecipeError
from shardkit.recipe.formats import QuantizedWeight, find_schemes, group_quantized
from shardkit.tensor import TensorSpec
from shardkit.verification.plain_weights import compute_weight
from tests.helpers.runtime_helpers import dequantize_weight

SAMPLES = list(list_format_samples())
MAX_ERRORS = {4: 0.13, 8: 0.03}  # of a random weight: the rounding of so many bits
SHAPES = [(64, 128), (192, 320), (200, 96), (3, 64, 128)]


def make_weight(
    sample: FormatSample, weight: torch.Tensor
) -> tuple[QuantizedWeight, dict[str, torch.Tensor]]:
    schemes = find_schemes({"quantization_config": sample.statement})
    scheme = next(scheme for scheme in schemes if scheme.format is sample.form)
    name = "experts.up_proj" if sample.form.codes.follows_parameter else "up_proj.weight"
    generator = torch.Generator().manual_seed(1)
    tensors = quantize_weight(name, weight, scheme, generator, sample.options)
    specs = [
        TensorSpec(name, BY_TORCH_NAME[torch_name(t.dtype)].name, tuple(t.shape))
        for name, t in tensors.items()
    ]
    (grouped,) = group_quantized(specs, [scheme]).weights.values()
    assert grouped.name == name
    return grouped, tensors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_both_ways_compute_the_weight(sample: FormatSample, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = weight.mT if sample.form.transposed else weight
    quantized, tensors = make_weight(sample, weight)
    value = dequantize_weight(quantized, tensors, torch.float32)
    plain = compute_weight(quantized, tensors)
    assert torch.equal(value, plain.mT if sample.form.transposed else plain)
    packed = quantized.scheme.count_packed(sample.form.codes, quantized.codes.dtype)
    bits = DTYPES[quantized.codes.dtype].bits // packed
    assert (value - weight).norm() / weight.norm() < MAX_ERRORS[bits]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_stored_tensor_matters(sample: FormatSample) -> None:
    """A weight is another one if any of what it is computed from is."""
    quantized, tensors = make_weight(sample, torch.randn(64, 128))
    value = compute_weight(quantized, tensors)
    others = sample.form.others
    for tensor, part in quantized.parts:
        raw = tensors[part.name]
        if any(tensor is other for other in others) or not raw.ndim:
            continue
        changed = (raw.contiguous().view(torch.uint8) ^ 1).view(raw.dtype)
        if tensor is sample.form.group_index:
            changed = (raw + 1) % (int(raw.max()) + 1)
        assert not torch.equal(compute_weight(quantized, {**tensors, part.name: changed}), value)


def test_an_fp4_number_is_its_bits() -> None:
    """All sixteen, by the OCP Microscaling Formats 1.0 specification, table 5."""
    (sample,) = [sample for sample in SAMPLES if sample.name == "mxfp4-pack-quantized"]
    quantized, tensors = make_weight(sample, torch.randn(1, 32))
    codes = torch.arange(16, dtype=torch.uint8)
    pairs = (codes[0::2] | (codes[1::2] << 4)).repeat(2)[None]
    scale = torch.tensor([[128]], dtype=torch.uint8)  # 2 to the power of 128 - 127
    tensors = {quantized.codes.name: pairs, quantized.parts[1][1].name: scale}
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]) * 2
    assert (
        dequantize_weight(quantized, tensors, torch.float32)[0, :16].tolist() == expected.tolist()
    )
    assert compute_weight(quantized, tensors)[0, :16].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "fp8-block",
            {"weight_scale_inv": (2, 2)},
            "has the shape [2, 2], but FP8 in blocks makes",
        ),
        ("fp8-block", {"weight_scale_inv": None}, "there is no up_proj.weight_scale_inv"),
        ("gptq", {"qzeros": None}, "there is no up_proj.scales and up_proj.qzeros"),
        ("awq", {"qweight": (64, 7)}, "correct quantization_config, or fetch the weights again"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    name: str, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    (sample,) = [sample for sample in SAMPLES if sample.name == name]
    quantized, _ = make_weight(sample, torch.randn(192, 320))
    specs = []
    for _, part in quantized.parts:
        shape = change.get(part.name.rpartition(".")[2], part.shape)
        specs += [] if shape is None else [TensorSpec(part.name, part.dtype, shape)]
    with pytest.raises(RecipeError) as caught:
        group_quantized(specs, [quantized.scheme])
    assert message in str(caught.value)


def test_bits_that_cross_words_are_refused() -> None:
    schemes = find_schemes(
        {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 32}}
    )
    specs = [
        TensorSpec("a.qweight", "I32", (24, 64)),
        TensorSpec("a.scales", "F16", (8, 64)),
        TensorSpec("a.qzeros", "I32", (8, 6)),
    ]
    with pytest.raises(RecipeError, match="GPTQ with 3 bits: its elements cross the words"):
        group_quantized(specs, schemes)
