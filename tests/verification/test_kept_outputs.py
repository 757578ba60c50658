"""What blocks output is the same after it was on disk, and leaves memory."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from shardkit.errors import OutputError
from shardkit.verification.blocks import BlockCall
from shardkit.verification.kept_outputs import KeptOutputs

CALLS = [BlockCall(f"layers.{number}", 0) for number in range(4)]


def make_outputs(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).mT,
        torch.tensor(float(number)),
        torch.empty(0, 4),
        torch.randn(6, generator=generator).bfloat16(),
    ]


@pytest.mark.parametrize("most", [0, 600, 1 << 20])
def test_outputs_are_those_that_were_kept_in_their_order(most: int) -> None:
    kept = KeptOutputs(most)
    for number, call in enumerate(CALLS):
        kept[call] = make_outputs(number)
    assert list(kept) == CALLS
    assert BlockCall("layers.0", 1) not in kept
    for number in (3, 0, 0, 2, 1):
        for tensor, expected in zip(kept[CALLS[number]], make_outputs(number), strict=True):
            assert tensor.dtype is expected.dtype
            assert torch.equal(tensor, expected)
    kept.clear()
    assert len(kept) == 0
    kept[CALLS[1]] = make_outputs(1)
    assert torch.equal(kept[CALLS[1]][0], make_outputs(1)[0])


def test_what_is_on_disk_is_not_in_memory() -> None:
    kept = KeptOutputs(0)
    for call in CALLS:
        kept[call] = [torch.zeros(12_345)]
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    assert not [tensor for tensor in tensors if tensor.shape == (12_345,)]


def test_no_folder_for_them_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="none: No such file"):
        KeptOutputs(0)[CALLS[0]] = make_outputs(0)
