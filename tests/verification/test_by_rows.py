"""Wide weights of which there are only some rows at a time give what whole ones give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from shardkit.verification import streamed_weights
from shardkit.verification.block_check import check_blocks
from shardkit.verification.streamed_weights import (
    ByteCounts,
    StreamedWeights,
    embed_by_rows,
    multiply_by_rows,
)
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut


@pytest.mark.parametrize("nbytes", [1, 1000, 1 << 20])
def test_rows_give_what_the_whole_weight_gives(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_weights, "ROW_BYTES", nbytes)
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((37, 19), (37,)))
    x, narrow = torch.randn(2, 3, 19, generator=generator).double(), weight.bfloat16()
    wide = narrow.double(), bias.double()
    product = multiply_by_rows(x, narrow, torch.float64, wide[1])
    torch.testing.assert_close(product, functional.linear(x, *wide), rtol=1e-14, atol=1e-14)
    ids = torch.tensor([[3, 36, 3]])
    rows = embed_by_rows(ids, narrow, torch.float64)
    assert torch.equal(rows, functional.embedding(ids, wide[0]))
    shorter = embed_by_rows(ids, narrow.clone(), torch.float64, None, 0.5)
    assert torch.equal(shorter, functional.embedding(ids, wide[0].clone(), None, 0.5))


class LargestOutput(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In a `with`, the most numbers that any operation has made at once."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("module", [nn.Embedding, nn.Linear])
def test_a_large_weight_is_never_wide_as_a_whole(
    module: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_weights, "SMALL", 1000)
    monkeypatch.setattr(streamed_weights, "ROW_BYTES", 4000)
    with torch.device("meta"):
        model = module(200, 50, dtype=torch.float64)
    narrow = {name: torch.ones(t.shape).bfloat16() for name, t in model.named_parameters()}
    tensors = dict(model.named_parameters())
    weights = StreamedWeights(model, tensors, lambda name: {name: narrow[name]}, ByteCounts())
    x = torch.tensor([[3, 9]]) if module is nn.Embedding else torch.ones(1, 200).double()
    with weights.running(), LargestOutput() as outputs:  # type: ignore[no-untyped-call]
        assert model(x).dtype is torch.float64
    assert 0 < outputs.largest <= 500


def test_a_check_by_rows_comes_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("llama", tmp_path / "source", "bfloat16")
    manifest = cut(source, tmp_path / "shards", 2)
    whole = check_blocks(tmp_path / "shards", manifest, source)
    monkeypatch.setattr(streamed_weights, "SMALL", 1000)
    monkeypatch.setattr(streamed_weights, "ROW_BYTES", 3000)
    by_rows = check_blocks(tmp_path / "shards", manifest, source)
    assert whole.verdict == by_rows.verdict == "passed"
    assert whole.numbers["bytes_read"] == by_rows.numbers["bytes_read"]
    key = "peak_weight_bytes"
    assert by_rows.numbers[key] < whole.numbers[key]  # type: ignore[operator]
