"""Huge pages are asked for inside of a tensor, and nowhere else."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardkit.authoring.samples import make_sample
from shardkit.runtime import weights
from shardkit.runtime.huge_pages import (
    HUGE_PAGE,
    LEAST_BYTES,
    TRIED_BYTES,
    PageChoice,
    advise_huge_pages,
)
from shardkit.runtime.weights import allocate_tensor
from shardkit.shards import read_manifest
from shardkit.tensor import TensorSpec
from tests.helpers.model_samples import VARIANTS
from tests.helpers.runtime_helpers import cut

LLAMA = VARIANTS["llama"]
WIDE = replace(LLAMA, config={**LLAMA.config, "vocab_size": 4 * HUGE_PAGE // 64})
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
    tensor, view = allocate_tensor(TensorSpec("weight", "F32", (4, HUGE_PAGE)), True)
    assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    view[:] = bytes([7]) * len(view)
    assert bool((tensor.view(torch.uint8) == 7).all())
    small, _ = allocate_tensor(TensorSpec("bias", "F32", (8,)), True)
    assert "hg" not in flags_at(small.data_ptr())


def test_pages_of_the_kind_that_was_faster_last_are_chosen() -> None:
    pages, tried = PageChoice(), []
    for seconds in (3.0, 1.0, 2.0, 5.0, 3.0, 3.0):  # from the fourth on, huge ones are slower
        tried.append(pages.choose(LEAST_BYTES))
        pages.record(tried[-1], LEAST_BYTES, seconds)
        pages.record(not tried[-1], LEAST_BYTES - 1, 1e-6)  # too little to tell
    assert tried == [False, True, True, True, False, False]


def test_huge_pages_are_not_tried_for_a_large_tensor() -> None:
    pages = PageChoice({False: 1.0})
    assert [pages.choose(nbytes) for nbytes in (TRIED_BYTES, TRIED_BYTES + 1)] == [True, False]
    pages.record(True, LEAST_BYTES, 1e-6)
    assert pages.choose(TRIED_BYTES + 1)


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.skipif(not ENABLED.exists(), reason="this kernel has no transparent huge pages")
def test_weights_are_read_into_pages_as_chosen(
    huge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = PageChoice()
    monkeypatch.setattr(weights, "_pages", pages)
    if huge:
        pages.record(False, LEAST_BYTES, 1.0)
    cut(make_sample(WIDE, tmp_path / "source"), tmp_path / "shards", 1)
    manifest = read_manifest(tmp_path / "shards")
    name = "model.embed_tokens.weight"
    read = weights.read_tensors(tmp_path / "shards", manifest, manifest.mesh.rank(0), {name}, False)
    ((_, tensor),) = read
    assert ("hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)) == huge
    assert pages.rates.keys() == {False, huge}


def test_other_devices_are_let_alone() -> None:
    assert advise_huge_pages(torch.empty(8 * HUGE_PAGE, device="meta")) == 0
