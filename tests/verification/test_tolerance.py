"""What two outputs are compared by: masks of the largest numbers neither hide nor are an error."""

import torch

from shardkit.verification.tolerance import (
    Error,
    compare_outputs,
    find_extremes,
    measure_error,
    measure_size,
)


def make_masked(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    """Scores, the last of which is masked by the least number of the dtype."""
    return torch.tensor([*values, torch.finfo(dtype).min], dtype=dtype)


def test_each_dtypes_least_number_is_equal_to_the_others() -> None:
    narrow, wide = (make_masked([1.0], dtype) for dtype in (torch.float32, torch.float64))
    assert measure_error(narrow, wide) == Error(0.0, 0.0)
    assert measure_error(-narrow, wide).rms == torch.inf


def test_a_mask_is_no_size_that_an_error_could_hide_behind() -> None:
    reference = make_masked([3.0, 4.0, 0.0], torch.float64)
    assert measure_size(reference) == Error(4.0, 2.5)
    assert measure_size(torch.tensor([-torch.inf, 2.0])).max == 2.0
    narrow = make_masked([3.0, 4.0, 0.0], torch.float32)
    wrong = make_masked([3.0, 4.1, 0.0], torch.float32)
    assert compare_outputs(narrow, narrow, reference, torch.float32).ok
    assert not compare_outputs(wrong, narrow, reference, torch.float32).ok


def test_extremes_have_their_signs() -> None:
    values = torch.tensor([-torch.inf, 1.0, torch.finfo(torch.float32).max, torch.nan])
    assert find_extremes(values)[:3].tolist() == [-1.0, 0.0, 1.0]
