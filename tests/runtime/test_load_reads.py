"""Loading reads a rank's own bytes, each once, and none of another rank's file."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from shardkit import runtime
from shardkit.checkpoint.header import read_header
from shardkit.runtime.batching.batch_runner import BatchRunner, JoiningPrompt
from shardkit.runtime.distributed.group import TensorParallelGroup
from tests.helpers.read_counts import count_reads
from tests.helpers.runtime_helpers import cut


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The bytes that are read of each file's data."""
    return count_reads(monkeypatch)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_file_once(
    rank: int, verify: bool, stories260k: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    shards = tmp_path / "shards"
    cut(stories260k, shards, 2)
    reads.clear()
    group = AloneOfTwo(rank, 2, torch.device("cpu"))
    runtime.load(shards, group=group, verify=verify, check_inputs=False)
    name = f"rank-{rank:05d}-of-00002.safetensors"
    data = sum(entry.spec.nbytes for entry in read_header(shards / name).entries)
    weights = {file: count for file, count in reads.items() if file.endswith(".safetensors")}
    assert weights == {name: data}


class AloneOfTwo(TensorParallelGroup):
    """A rank that agrees with itself: nothing is computed."""

    def all_agree(self, *_arguments: object, **_options: object) -> tuple[str, ...]:
        return ()


def test_only_the_last_position_of_a_prompt_has_logits(stories260k: Path, tmp_path: Path) -> None:
    cut(stories260k, tmp_path / "shards", 1)
    model, rows = runtime.load(tmp_path / "shards"), list[tuple[int, ...]]()
    model.lm_head.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[:2]))
    model.generate(torch.tensor([[1, 403, 407], [1, 261, 5]]), max_new_tokens=2)
    assert rows == [(2, 1), (2, 1)]
    batch = BatchRunner(model, torch.device("cpu"), is_sampler=False)
    rows.clear()
    batch.run_step({}, [JoiningPrompt(0, [1, 403, 407], {}, None)])
    assert set(rows) == {(1, 1)}
