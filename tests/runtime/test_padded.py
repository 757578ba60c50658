"""Column-parallel layers whose outputs are padded, and the row-parallel ones after them."""

import torch
from torch import nn

from shardkit.layout import Span
from shardkit.runtime.layers.linear import make_padded, make_row_parallel

SPANS = [(Span(0, 2), Span(4, 6)), (Span(2, 4), Span(6, 8))]  # of two sections of two heads


class OneRank:
    """A rank whose part is what it has computed: the test sums the parts."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def select_rows(spans: tuple[Span, ...]) -> list[int]:
    return [row for start, stop in spans for row in range(start, stop)]


def test_padded_outputs_have_the_whole_width_and_sum_to_the_whole() -> None:
    first, last = nn.Linear(5, 8), nn.Linear(8, 3, bias=False)
    x = torch.randn(2, 4, 5)
    hidden = first(x)
    parts = []
    for spans in SPANS:
        rows = select_rows(spans)
        column, row = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)
        column.weight, column.bias = (nn.Parameter(p[rows]) for p in (first.weight, first.bias))
        row.weight = nn.Parameter(last.weight[:, rows])
        make_padded(column, 8, spans)
        make_row_parallel(row, OneRank(), spans)  # type: ignore[arg-type]
        output = column(x)
        assert torch.allclose(output[..., rows], hidden[..., rows])
        assert output.shape == hidden.shape
        assert int((output != 0).sum()) == 2 * 4 * len(rows)
        assert torch.allclose(row(output), row(output[..., rows])), "its own features alone"
        parts.append(row(output))
    assert torch.allclose(sum(parts, torch.zeros(3)), last(hidden), atol=1e-6)
