"""The weights that we compute are those that the formats' own libraries compute."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shardkit.authoring.format_samples import FormatSample
from tests.helpers.runtime_helpers import dequantize_weight
from tests.recipe.formats.test_arithmetic import SAMPLES, make_weight

COMPRESSED = [
    sample
    for sample in SAMPLES
    if sample.statement.get("quant_method") == "compressed-tensors"
    if "weight_g_idx" not in sample.options  # which the library reads no more
]


@pytest.mark.parametrize("sample", COMPRESSED, ids=lambda sample: sample.name)
def test_compressed_tensors_computes_the_same(sample: FormatSample) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    quantized, tensors = make_weight(sample, torch.randn(64, 128))
    stated = {**sample.statement["config_groups"]["group_0"]["weights"]}
    stated["symmetric"] = "weight_zero_point" not in sample.options
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**stated)
    )
    name = str(sample.statement["format"])
    compressor = compressors.BaseCompressor.get_value_from_registry(name)
    local = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    expected = compressor.decompress(local, scheme)["weight"]
    value = dequantize_weight(quantized, tensors, torch.float32)
    assert torch.equal(value.to(expected.dtype), expected)


def test_transformers_computes_the_same_of_mxfp4() -> None:
    (sample,) = [sample for sample in SAMPLES if sample.name == "mxfp4"]
    quantized, tensors = make_weight(sample, torch.randn(3, 128, 64))
    blocks, scales = (tensors[part.name] for _, part in quantized.parts)
    expected = convert_moe_packed_tensors(blocks, scales)
    value = dequantize_weight(quantized, tensors, torch.bfloat16)
    assert torch.equal(value, expected)
