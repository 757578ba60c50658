"""The vocabulary's two ends."""

import torch
from torch import nn

from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.embedding import make_vocab_parallel
from tests.helpers.operations import RecordNames


def test_logits_of_last_tokens_are_of_one_product() -> None:
    """Torch's product for each sequence, `bmm`, copies a bfloat16 weight."""
    layer = nn.Linear(64, 500, bias=False).requires_grad_(False)
    x = torch.randn(3, 8, 64)[:, -1:]  # as generate takes them of a prompt
    expected = torch.stack([nn.functional.linear(each, layer.weight) for each in x])
    with RecordNames() as usual:
        layer(x)
    assert "bmm" in usual.names  # which is why
    make_vocab_parallel(layer, TensorParallelGroup(0, 1, torch.device("cpu")), 0, [500])
    with RecordNames() as ours:
        logits = layer(x)
    assert ours.names & {"mm", "_linear_pointwise"}
    assert "bmm" not in ours.names
    torch.testing.assert_close(logits, expected)
    assert layer(x[0]).shape == (1, 500)
    assert layer(x[:0]).shape == (0, 1, 500)
