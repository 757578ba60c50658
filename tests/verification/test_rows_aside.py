"""Rows that 16 bits route elsewhere: few may be set aside, and only where float32 proves all."""

import pytest
import torch

from shardkit.verification.block_record import BlockRecord
from shardkit.verification.blocks import BlockCall
from shardkit.verification.tolerance import Error, measure_error, set_rows_aside

CALL = BlockCall("layers.0", 0)
ALLOWED = Error(0.1, 0.05)


def make_rows(count: int, moved: int, by: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    reference = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(0))
    values = reference.clone()
    values[0, :moved] += by
    return values, reference


@pytest.mark.parametrize(
    ("count", "moved", "aside"),
    [(12, 0, 0), (12, 1, 1), (12, 3, 3), (12, 4, 0), (4, 2, 0), (2, 1, 1), (1, 1, 0)],
)
def test_one_row_of_four_may_be_set_aside_and_no_more(count: int, moved: int, aside: int) -> None:
    values, reference = make_rows(count, moved)
    error, rows = set_rows_aside(values, reference, ALLOWED)
    assert rows == aside
    assert error == (Error(0.0, 0.0) if aside == moved else measure_error(values, reference))


def test_no_more_rows_are_set_aside_than_need_be() -> None:
    values, reference = make_rows(16, 1)
    values[0, 5] += 0.09  # within what is allowed
    assert set_rows_aside(values, reference, ALLOWED)[1] == 1


def test_a_number_that_is_not_finite_is_set_aside_once() -> None:
    values, reference = make_rows(8, 0)
    values[0, 2, 3] = torch.nan
    assert set_rows_aside(values, reference, ALLOWED) == (Error(0.0, 0.0), 1)


@pytest.mark.parametrize(("dtype", "is_fault"), [(torch.bfloat16, False), (torch.float32, True)])
def test_only_in_16_bits_is_a_row_set_aside(dtype: torch.dtype, is_fault: bool) -> None:
    """The float32 run of the same shards sets none aside, so that a wrong layout shows there."""
    values, reference = make_rows(12, 2, by=3.0)
    record = BlockRecord(torch.bfloat16)
    record.keep_expected(CALL, [reference.double()])
    record.measure_rounding(dtype, CALL, [reference.to(dtype)])
    record.compare_rank(dtype, 1, CALL, [values.to(dtype)])
    (comparison,) = record.comparisons
    assert (record.find_first_fault() is not None) == is_fault
    assert comparison.rows_aside == (0 if is_fault else 2)
