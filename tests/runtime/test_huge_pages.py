"""Huge pages are asked for inside of a tensor, and nowhere else."""

import re
from pathlib import Path

import pytest
import torch

from shardkit.runtime.huge_pages import HUGE_PAGE, advise_huge_pages
from shardkit.runtime.weights import allocate_tensor
from shardkit.tensor import TensorSpec

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> set[str]:
    """What the kernel notes of the memory at an address: "hg" if huge pages are asked for."""
    flags: set[str] = set()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if limits := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(limits[1], 16) <= address < int(limits[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = set(line.split()[1:])
    return flags


@pytest.mark.parametrize("nbytes", [0, 1, HUGE_PAGE - 1, 2 * HUGE_PAGE, 9 * HUGE_PAGE + 5])
def test_whole_pages_inside_of_a_tensor_are_asked_for(nbytes: int) -> None:
    asked = advise_huge_pages(torch.empty(nbytes, dtype=torch.uint8))
    assert asked % HUGE_PAGE == 0
    assert max(0, nbytes - 2 * HUGE_PAGE) < asked + 1 <= nbytes + 1


@pytest.mark.skipif(not ENABLED.exists(), reason="this kernel has no transparent huge pages")
def test_the_kernel_notes_it_of_weights_that_are_read() -> None:
    tensor, view = allocate_tensor(TensorSpec("weight", "F32", (4, HUGE_PAGE)))
    assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    view[:] = bytes([7]) * len(view)
    assert bool((tensor.view(torch.uint8) == 7).all())
    small, _ = allocate_tensor(TensorSpec("bias", "F32", (8,)))
    assert "hg" not in flags_at(small.data_ptr())


def test_other_devices_are_let_alone() -> None:
    assert advise_huge_pages(torch.empty(8 * HUGE_PAGE, device="meta")) == 0
