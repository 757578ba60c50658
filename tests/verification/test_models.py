"""The unsharded model that a sharded one is compared with."""

import torch
from torch.nn import functional

from shardkit.verification.models import PromotedSampling


def test_a_float32_table_is_sampled_at_float64_places() -> None:
    table = torch.arange(16, dtype=torch.float32).view(1, 1, 4, 4)
    places = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    with PromotedSampling():
        found = functional.grid_sample(table, places, align_corners=False)
    assert (found.dtype, found.item()) == (torch.float64, 7.5)
