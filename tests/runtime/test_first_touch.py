"""New memory is touched inside of a tensor alone, in the kind of pages that was faster last."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardkit.authoring.samples import make_sample
from shardkit.runtime import first_touch, weights
from shardkit.runtime.first_touch import (
    CHUNK,
    HUGE_PAGE,
    MADV_HUGEPAGE,
    MADV_POPULATE_WRITE,
    FirstTouch,
    find_huge_pages,
)
from shardkit.shards import read_manifest
from shardkit.shards.integrity import RankReader
from tests.helpers.model_samples import VARIANTS
from tests.helpers.runtime_helpers import cut

LLAMA = VARIANTS["llama"]
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
Advice = tuple[int, int]  # bytes, and what is advised of them


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


def read_resident() -> int:
    """The bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Clock:
    """Time that passes only while memory is touched, as long as each kind of pages takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, usual: float, huge: float) -> None:
        self.now, self.usual, self.huge = 0.0, usual, huge
        self.advice: list[Advice] = []
        monkeypatch.setattr(first_touch, "advise_kernel", self.take_time)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def take_time(self, start: int, size: int, advice: int) -> bool:
        """Take the time of touching it."""
        is_huge = self.advice[-1:] == [(size, MADV_HUGEPAGE)]
        self.advice.append((size, advice))
        if advice == MADV_POPULATE_WRITE:
            self.now += size * (self.huge if is_huge else self.usual)
        return True


def list_kinds(advice: list[Advice]) -> list[bool]:
    """For each chunk that was touched, whether in huge pages."""
    touched = [n for n, (_, kind) in enumerate(advice) if kind == MADV_POPULATE_WRITE]
    return [n > 0 and advice[n - 1][1] == MADV_HUGEPAGE for n in touched]


@pytest.mark.parametrize("nbytes", [0, 1, HUGE_PAGE - 1, 2 * HUGE_PAGE, 9 * HUGE_PAGE + 5])
def test_whole_huge_pages_inside_of_a_tensor_are_found(nbytes: int) -> None:
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    start, stop = find_huge_pages(tensor)
    assert (stop - start) % HUGE_PAGE == 0
    assert max(0, nbytes - 2 * HUGE_PAGE) < stop - start + 1 <= nbytes + 1
    if start < stop:
        assert tensor.data_ptr() <= start
        assert stop <= tensor.data_ptr() + nbytes


def test_memory_is_there_once_it_is_touched_and_holds_what_it_held() -> None:
    tensor = torch.empty(40 * HUGE_PAGE, dtype=torch.uint8)
    tensor[::HUGE_PAGE] = 7
    before = read_resident()
    touch = FirstTouch()
    touch.touch_memory(tensor)
    if not touch.rates[False]:
        pytest.skip("this kernel does not touch memory on request (Linux 5.14)")
    assert read_resident() - before > 38 * HUGE_PAGE
    assert bool((tensor[::HUGE_PAGE] == 7).all())


@pytest.mark.skipif(not ENABLED.exists(), reason="this kernel has no transparent huge pages")
def test_the_kernel_notes_what_was_asked_for() -> None:
    for is_huge in (True, False):
        tensor = torch.empty(4 * HUGE_PAGE, dtype=torch.uint8)
        FirstTouch({False: 1.0, True: 2.0 if is_huge else 0.5}).touch_memory(tensor)
        assert ("hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)) == is_huge


def test_pages_of_the_kind_that_was_faster_last_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, touch = Clock(monkeypatch, usual=3.0, huge=1.0), FirstTouch()
    tensor = torch.empty(3 * CHUNK + HUGE_PAGE, dtype=torch.uint8)
    touch.touch_memory(tensor[: 2 * CHUNK + HUGE_PAGE])
    assert list_kinds(clock.advice) == [False, True] + [True] * (len(list_kinds(clock.advice)) - 2)
    clock.advice.clear()
    clock.huge = 4.0  # from here on the host has to find them
    touch.touch_memory(tensor)
    assert list_kinds(clock.advice)[:3] == [True, False, False]


def test_usual_pages_are_left_to_who_writes_them_once_their_rate_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, touch = Clock(monkeypatch, usual=1.0, huge=2.0), FirstTouch()
    for _ in range(4):
        touch.touch_memory(torch.empty(2 * HUGE_PAGE, dtype=torch.uint8), touches_usual=False)
    assert list_kinds(clock.advice) == [False, True]


def test_what_the_kernel_refuses_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []

    def refuse(start: int, size: int, advice: int) -> bool:
        refused.append(advice)
        return False

    monkeypatch.setattr(first_touch, "advise_kernel", refuse)
    touch = FirstTouch()
    for _ in range(4):
        touch.touch_memory(torch.empty(2 * HUGE_PAGE, dtype=torch.uint8), touches_usual=False)
    assert touch.rates == {False: 0.0, True: 0.0}
    assert refused == [MADV_POPULATE_WRITE, MADV_HUGEPAGE, MADV_POPULATE_WRITE]


@pytest.mark.parametrize(("threads", "cached"), [(1, True), (1, False), (4, True)])
def test_weights_are_touched_first_if_no_disk_and_no_other_thread_is_there_to_do_it(
    threads: int, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []

    class Recorder(FirstTouch):
        def touch_memory(self, tensor: torch.Tensor, touches_usual: bool = True) -> None:
            calls.append((tensor.nbytes, touches_usual))

    monkeypatch.setattr(weights, "_first_touch", Recorder())
    monkeypatch.setattr(weights, "count_rank_cores", lambda: threads)
    monkeypatch.setattr(RankReader, "is_cached", lambda *_: cached)
    wide = replace(LLAMA, config={**LLAMA.config, "vocab_size": 4 * HUGE_PAGE // 64})
    cut(make_sample(wide, tmp_path / "source"), tmp_path / "shards", 1)
    manifest = read_manifest(tmp_path / "shards")
    name = "model.embed_tokens.weight"
    rank = manifest.mesh.rank(0)
    ((_, tensor),) = weights.read_tensors(tmp_path / "shards", manifest, rank, {name}, False)
    assert calls == ([(tensor.nbytes, threads == 1)] if cached else [])


def test_other_devices_are_let_alone() -> None:
    assert find_huge_pages(torch.empty(8 * HUGE_PAGE, device="meta")) == (0, 0)
