"""Linear layers of float32 on a CPU: by oneDNN if that is faster here, else as torch has it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers import product
from shardkit.runtime.layers.embedding import make_vocab_parallel
from shardkit.runtime.layers.linear import make_column_parallel, make_row_parallel
from tests.helpers.operations import RecordNames

GROUP = TensorParallelGroup(0, 1, torch.device("cpu"))
FORMS: dict[str, Callable[[nn.Module], None]] = {
    "column": make_column_parallel,
    "row": lambda layer: make_row_parallel(layer, GROUP),
    "head": lambda layer: make_vocab_parallel(layer, GROUP, 0, [5]),
}
ONEDNN = "_linear_pointwise"


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def prefers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this processor has oneDNN's products."""
    chosen: bool = request.param
    monkeypatch.setattr(product, "prefers_onednn", lambda: chosen)
    monkeypatch.setattr(product, "MIN_PRODUCTS", 1)
    return chosen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (3, 2, 8), (0, 8)])
def test_every_form_multiplies_by_what_the_processor_prefers(
    form: str, bias: bool, shape: tuple[int, ...], prefers: bool
) -> None:
    layer, x = nn.Linear(8, 5, bias=bias).requires_grad_(False), torch.randn(shape)
    expected = layer(x)
    FORMS[form](layer)
    with RecordNames() as seen:
        torch.testing.assert_close(layer(x), expected)
    assert (ONEDNN in seen.names) == (prefers and x.numel() > 0)


def test_columns_of_an_input_are_taken_as_they_are(prefers: bool) -> None:
    layer, x = nn.Linear(8, 5).requires_grad_(False), torch.randn(4, 6, 16)[:, ::2, :8]
    torch.testing.assert_close(product.multiply_weight(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_torch_has_them(dtype: torch.dtype, prefers: bool) -> None:
    layer, x = nn.Linear(8, 5, dtype=dtype).requires_grad_(False), torch.randn(3, 8, dtype=dtype)
    with RecordNames() as seen:
        assert torch.equal(product.multiply_weight(x, layer.weight), F.linear(x, layer.weight))
    assert ONEDNN not in seen.names


def test_a_compiled_layer_multiplies_by_what_the_processor_prefers(prefers: bool) -> None:
    layer, x, calls = nn.Linear(8, 5).requires_grad_(False), torch.randn(3, 8), list[str]()

    def record_calls(
        graph: torch.fx.GraphModule, _: Sequence[torch.Tensor]
    ) -> Callable[..., object]:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    multiply = torch.compile(product.multiply_weight, backend=record_calls, fullgraph=True)
    torch.testing.assert_close(multiply(x, layer.weight, layer.bias), layer(x))
    assert ("shardkit.linear.default" in calls) == prefers, calls


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 0, 8)])
def test_the_operator_of_a_compiled_layer_is_what_torch_asks_of_one(
    shape: tuple[int, ...],
) -> None:
    weight, bias = torch.randn(5, 8), torch.randn(5)
    for given in (bias, None):
        torch.library.opcheck(torch.ops.shardkit.linear, (torch.randn(shape), weight, given))


def test_gradients_pass(prefers: bool) -> None:
    layer, x = nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True)
    total = product.multiply_weight(x, layer.weight, layer.bias).sum()
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(3, 8))


def test_who_turns_onednn_off_has_none(prefers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(8, 5).requires_grad_(False), torch.randn(3, 8)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with RecordNames() as seen:
        product.multiply_weight(x, layer.weight)
    assert ONEDNN not in seen.names


@pytest.mark.parametrize(("rows", "expected"), [(7, False), (8, True)])
def test_a_small_product_is_not_worth_a_beginning(
    rows: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "prefers_onednn", lambda: True)
    layer, x = nn.Linear(256, 256).requires_grad_(False), torch.randn(rows, 256)
    with RecordNames() as seen:
        torch.testing.assert_close(product.multiply_weight(x, layer.weight, layer.bias), layer(x))
    assert (ONEDNN in seen.names) == expected


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_processors_that_mkl_serves_well_keep_it(
    vendor: str, capability: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(product, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert product.prefers_onednn.__wrapped__() is expected
    monkeypatch.setattr(product, "CPU_INFO", tmp_path / "absent")
    assert not product.prefers_onednn.__wrapped__()
