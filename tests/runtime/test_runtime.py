"""The runtime on trained models: under torchrun, and driven from one process."""

import os
import shutil
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardkit import runtime
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import ManifestError, RanksError, RanksLost, RequestError, UsageError
from shardkit.runtime.engine.messages import (
    Message,
    forward_request,
    load_request,
    step_request,
)
from shardkit.runtime.load_options import LoadOptions
from shardkit.timeouts import Timeouts
from tests.helpers.real_inputs import shared
from tests.helpers.runtime_helpers import cut
from tests.helpers.torchrun import STORY, golden, torchrun

OWN_GROUP = """
import json, os, pathlib, sys, threading, torch
import torch.distributed as dist
from shardkit import runtime
from shardkit.errors import RanksError
from shardkit.runtime.engine import controller
from shardkit.runtime.engine.controller import TorchrunRanks
from shardkit.runtime.engine.messages import generate_request, load_request, trace_request

if sys.argv[3] == "own":
    dist.init_process_group("gloo")
group = runtime.connect("cpu")
assert (group.link is None) == (sys.argv[3] == "own")
ranks = TorchrunRanks(group)
if group.tp_rank:
    ranks.follow()
    said = {}
else:
    ranks.request(load_request(pathlib.Path(sys.argv[1])))
    inputs = {"input_ids": torch.tensor([[1]])}
    options = {"max_new_tokens": 20, "do_sample": False}
    (made,) = ranks.request(generate_request(inputs, options, with_logits=True))
    (traced,) = ranks.request(trace_request(inputs, ["lm_head", "model.norm"]))
    said = {
        "ids": made.tensors["ids"][0].tolist(), "logits": list(made.tensors["logits"].shape),
        "traced": sorted(traced.tensors),
    }
    controller.GRACE = float(sys.argv[4])
    begun, options["max_new_tokens"] = threading.Event(), 200
    asked = generate_request(inputs, options, stream=True)
    def ask():
        try:
            (late,) = ranks.request(asked, lambda tokens: begun.set() or True)
            said["late"] = late.tensors["ids"][0].tolist()
        except RanksError as error:
            said["late"] = str(error)
    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait(60)
    ranks.close()
    thread.join(60)
pathlib.Path(sys.argv[2], f"said-{group.tp_rank}").write_text(json.dumps(said))
"""


@pytest.mark.parametrize("made_by", [pytest.param("own", marks=pytest.mark.slow), "ours"])
def test_rank_0_controls_the_others_through_the_store_or_without(
    made_by: str, stories_tp2: Path, tmp_path: Path
) -> None:
    code, answers = torchrun(2, stories_tp2, tmp_path, OWN_GROUP, made_by, "60")
    assert code == 0
    assert answers[0]["ids"] == golden()[:21]
    assert answers[0]["logits"] == [1, 20, 512]
    assert answers[0]["traced"] == ["lm_head", "model.norm"]
    assert answers[0]["late"] == golden()[:201]  # which was closed in the middle


@pytest.mark.slow
def test_closing_ends_a_call_of_another_thread_that_takes_too_long(
    stories_tp2: Path, tmp_path: Path
) -> None:
    code, answers = torchrun(2, stories_tp2, tmp_path, OWN_GROUP, "ours", "0")
    assert code != 0
    assert [each["late"] for each in answers] == ["the engine was closed during a call"]


@pytest.fixture(scope="module")
def stories_tp2(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Path:
    folder = tmp_path_factory.mktemp("runtime") / "tp2"
    cut(stories260k, folder, 2)
    return folder


@pytest.fixture(scope="module")
def engine(stories_tp2: Path) -> Iterator[runtime.Engine]:
    """Ranks that several tests use, each of which must leave them as they were."""
    with runtime.launch(stories_tp2) as started:
        yield started


@pytest.fixture
def shards(stories_tp2: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(stories_tp2, tmp_path / "copy"))


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_wrong_world_size_is_refused_by_every_rank(stories_tp2: Path, tmp_path: Path) -> None:
    code, said = torchrun(3, stories_tp2, tmp_path, STORY, "1")
    assert code != 0
    assert len(said) == 3
    assert all("tp_size 2, but 3 ranks" in found["error"] for found in said)


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_missing_shard_is_reported_by_every_rank(shards: Path, tmp_path: Path) -> None:
    (shards / "rank-00001-of-00002.safetensors").unlink()
    code, said = torchrun(2, shards, tmp_path, STORY, "1")
    assert code != 0
    assert [found["code"] for found in said] == [7, 7]
    assert all("rank 1" in found["error"] and "missing" in found["error"] for found in said)


def test_ranks_with_different_splits_refuse_each_other(
    shards: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    cut(shared("models/stories260K-sharded"), other, 2)
    name = "rank-00000-of-00002.safetensors"
    (shards / name).write_bytes((other / name).read_bytes())
    with pytest.raises(RanksError, match=r"rank-00000-of-00002.safetensors: of another split"):
        rank_pool.of(2).request(load_request(shards))


def test_swapped_shards_are_refused(shards: Path, rank_pool: RankPool) -> None:
    first, second = (shards / f"rank-0000{r}-of-00002.safetensors" for r in (0, 1))
    first.rename(shards / "x")
    second.rename(first)
    (shards / "x").rename(second)
    with pytest.raises(RanksError, match=r"rank-00000.*is the file of rank '1', renamed"):
        rank_pool.of(2).request(load_request(shards))


def test_a_changed_config_is_refused(shards: Path, rank_pool: RankPool) -> None:
    config = shards / "config.json"
    config.write_text(config.read_text().replace('_heads": 8', '_heads": 4'))
    with pytest.raises(
        RanksError, match=r"config.json: not the file that was copied from the source"
    ):
        rank_pool.of(2).request(load_request(shards))


def test_launching_an_unfinished_split_starts_nothing(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="unfinished"):
        runtime.launch(shards)


def test_an_engine_streams_text_and_ids_as_they_come(engine: runtime.Engine) -> None:
    parts = list(engine.stream("Once upon a time", max_new_tokens=30, do_sample=False))
    whole = engine.generate("Once upon a time", max_new_tokens=30, do_sample=False)[0]
    ids = list(engine.stream([1, 403, 407], max_new_tokens=5, do_sample=False))
    prompt = engine.input_ids("Once upon a time").shape[1]
    text = engine.tokenizer.decode(whole[prompt:], skip_special_tokens=True)
    one, two = (engine.generate([1], seed=s, max_new_tokens=20, do_sample=True) for s in (5, 5))
    other = engine.generate([1], seed=6, max_new_tokens=20, do_sample=True)
    assert len(parts) > 5
    assert "".join(parts).strip() == text.strip()
    assert ids == golden()[3:8]
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_caller_that_stops_iterating_stops_every_rank_and_may_go_on(
    engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, ran = 10**6, []  # more than the positions, so that no running batch takes it
    request = engine.ranks.request

    def record(*arguments: Any) -> list[Message]:
        responses = request(*arguments)
        if arguments[0].header["action"] == "call":
            ran.append(responses[0].tensors["0"].shape[1] - 1)
        return responses

    monkeypatch.setattr(engine.ranks, "request", record)
    for turn in range(4):
        stream = engine.stream([1], seed=turn, max_new_tokens=many, do_sample=turn % 2 > 0)
        first = [next(stream) for _ in range(3)]
        assert isinstance(stream, Generator)
        stream.close()
        # It waits for the abandoned request; ranks that had not stopped in step would hang.
        again = engine.generate([1], max_new_tokens=5, do_sample=False)[0].tolist()
        assert again == golden()[:6]
        assert turn % 2 or first == golden()[1:4]
    assert len(ran) == 4
    assert all(3 <= steps < 1000 for steps in ran), ran


def test_an_option_that_cannot_be_sent_is_an_error_and_the_engine_goes_on(
    engine: runtime.Engine,
) -> None:
    with pytest.raises(RequestError, match=r"^bad_words_ids: a object cannot be sent"):
        list(engine.stream([1], max_new_tokens=2, bad_words_ids=object()))
    assert len(list(engine.stream([1], max_new_tokens=2))) == 2


def test_a_token_outside_the_vocabulary_is_an_error_and_the_engine_goes_on(
    engine: runtime.Engine,
) -> None:
    with pytest.raises(RequestError, match="token ids 1 to 512, but the vocabulary has 512"):
        engine.logits([1, 512])
    assert engine.logits([1, 2]).shape == (1, 2, 512)


def test_a_killed_rank_is_noticed_unasked_and_nothing_is_left_running(stories_tp2: Path) -> None:
    engine = runtime.launch(stories_tp2)
    pids = engine.ranks.pids
    os.kill(pids[1], signal.SIGKILL)
    end = time.monotonic() + 20
    while engine.alive and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.status().failure == "rank 1 was killed by SIGKILL"
    with pytest.raises(RanksLost, match="rank 1 was killed by SIGKILL"):
        engine.logits([1, 2])
    assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_a_stopped_rank_is_reported_within_the_timeout(stories_tp2: Path) -> None:
    engine = runtime.launch(stories_tp2, timeouts=Timeouts(request=3))
    os.kill(engine.ranks.pids[1], signal.SIGSTOP)
    with pytest.raises(RanksError, match=r"rank 1 died or is stopped.*did not answer within 3 s"):
        engine.logits([1, 2])
    assert not any(alive(pid) for pid in engine.ranks.pids)


def test_a_stopped_rank_is_missed_though_no_other_waits_for_it(stories_tp2: Path) -> None:
    engine = runtime.launch(stories_tp2, timeouts=Timeouts(collective=3, request=600))
    os.kill(engine.ranks.pids[1], signal.SIGSTOP)
    with pytest.raises(RanksLost, match=r"^rank 1 died or is stopped: no sign of life for 3 s$"):
        engine.ranks.request(step_request({}, []))  # which takes no collective
    assert not any(alive(pid) for pid in engine.ranks.pids)


def test_collectives_are_as_few_as_the_architecture_allows(engine: runtime.Engine) -> None:
    request = forward_request({"input_ids": torch.tensor([[1, 2]])}, {})
    answer = engine.ranks.request(request)[0]
    assert answer.header["counts"] == {"all_reduce": 2 * 5 + 1, "all_gather": 1}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"


def test_a_mapped_model_computes_the_same(shards: Path, rank_pool: RankPool) -> None:
    ranks, outputs = rank_pool.of(2), []
    for mmap in (False, True):
        ranks.request(load_request(shards, LoadOptions(mmap=mmap)))
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in ranks.pids]
        assert all((str(shards) in text) == mmap for text in maps)
        outputs.append(
            ranks.request(forward_request({"input_ids": torch.tensor([[1, 403, 407]])}))[0].tensors[
                "logits"
            ]
        )
    assert torch.equal(*outputs)


def test_what_is_mapped_is_not_verified(shards: Path) -> None:
    for call in (runtime.load, runtime.launch):
        with pytest.raises(UsageError, match="leave out one of them"):
            call(shards, verify=True, mmap=True)
