"""The unsharded model that a sharded one is compared with."""

import torch
from torch.nn import functional

from shardkit.verification.models import PromotedArguments


def test_a_float32_table_is_sampled_at_float64_places() -> None:
    table = torch.arange(16, dtype=torch.float32).view(1, 1, 4, 4)
    places = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    with PromotedArguments():
        found = functional.grid_sample(table, places, align_corners=False)
    assert (found.dtype, found.item()) == (torch.float64, 7.5)


def test_float32_heads_are_multiplied_with_float64_ones() -> None:
    heads = torch.ones(2, 3, dtype=torch.float32)
    with PromotedArguments():
        products = heads @ heads.double().T
    assert (products.dtype, products[0, 0].item()) == (torch.float64, 3.0)


def test_a_float32_input_is_multiplied_by_float64_weights() -> None:
    rows = torch.ones(1, 2, dtype=torch.float32)
    with PromotedArguments():
        product = functional.linear(rows, torch.full((1, 2), 0.1, dtype=torch.float64))
    assert (product.dtype, product.item()) == (torch.float64, 0.2)


def test_a_float32_table_is_filled_with_its_own_least_number() -> None:
    table = torch.zeros(2, dtype=torch.float32)
    with PromotedArguments():
        table.fill_(torch.finfo(torch.float64).min)
    assert torch.equal(table, torch.full((2,), torch.finfo(torch.float32).min))
    with PromotedArguments():
        assert torch.isinf(table.fill_(-torch.inf)).all()
