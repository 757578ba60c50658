"""Requests to a running model: many at once, each by its own parameters, from threads and asyncio.

Every greedy answer is compared with the unsharded model's own, made one at a time.
"""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardkit import runtime
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import (
    EngineBusy,
    RanksError,
    RequestCancelled,
    RequestError,
    RequestTimeout,
    ShardkitError,
)
from tests.client import whole_interface
from tests.helpers.stories_engine import STORY, continue_alone, run_stories, wait_until_idle

SECONDS = 60.0  # that a test waits for a request
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 5},
    {"top_k": 5, "seed": 3},
    {"top_p": 0.7, "repetition_penalty": 1.3, "temperature": 1.2, "seed": 9},
    {"min_p": 0.1, "seed": 1},
]


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, stories260k: Path, rank_pool: RankPool
) -> Iterator[runtime.Engine]:
    folder = tmp_path_factory.mktemp("engine") / "tp2"
    with run_stories(stories260k, folder, rank_pool, max_queue=64) as started:
        yield started


@pytest.fixture(scope="module")
def reference(stories260k: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories260k).eval().requires_grad_(False)


def make_prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 9 tokens."""
    return [[1, *((7 * i + 13 * j) % 500 + 3 for j in range(i % 9))] for i in range(count)]


def test_sequences_that_join_and_leave_are_those_of_generate(
    engine: runtime.Engine, reference: Any
) -> None:
    assert engine.status().obstacle == ""
    prompts = make_prompts(40)  # more than may run together, each of another length
    sizes = [10 + 3 * i % 17 for i in range(40)]
    before = engine.status()
    handles = [
        engine.submit(ids, max_tokens=size, temperature=0)
        for ids, size in zip(prompts, sizes, strict=True)
    ]
    made = [list(handle.result(SECONDS).ids) for handle in handles]
    assert made == [
        continue_alone(reference, ids, size) for ids, size in zip(prompts, sizes, strict=True)
    ]
    after = engine.status()
    assert after.tokens - before.tokens == sum(map(len, made))
    assert after.steps - before.steps < sum(map(len, made)) / 4  # they ran together


@pytest.mark.parametrize("given", SAMPLED, ids=str)
def test_a_seeded_sample_is_that_of_transformers(
    given: dict[str, Any], engine: runtime.Engine, reference: Any
) -> None:
    others = [engine.submit([1, 5 + i], max_tokens=12, temperature=1.0) for i in range(3)]
    made = engine.submit([1, 403], max_tokens=15, **given).result(SECONDS)
    torch.manual_seed(given["seed"])
    options = {name: value for name, value in given.items() if name != "seed"}
    assert list(made.ids) == continue_alone(reference, [1, 403], 15, do_sample=True, **options)
    for other in others:
        other.result(SECONDS)


def test_an_unseeded_request_after_a_seeded_one_does_not_repeat(engine: runtime.Engine) -> None:
    made = set()
    for _ in range(3):
        engine.generate([[1], [2]], seed=7, max_new_tokens=4, do_sample=True)
        made.add(str(engine.generate([[1], [2]], max_new_tokens=12, do_sample=True)))
    assert len(made) > 1


def test_n_sequences_echo_and_logprobs(engine: runtime.Engine, reference: Any) -> None:
    result = engine.submit("Once", n=3, seed=4, temperature=1.0, max_tokens=8).result(SECONDS)
    assert [c.index for c in result.completions] == [0, 1, 2]
    assert len({c.ids for c in result.completions}) == 3
    second = engine.submit("Once", seed=5, temperature=1.0, max_tokens=8).result(SECONDS)
    assert second.ids == result.completions[1].ids
    echoed = engine.submit("Once upon", echo=True, max_tokens=3).result(SECONDS)
    assert echoed.text.startswith("Once upon a time")
    (made,) = engine.submit(STORY, max_tokens=1, logprobs=3).result(SECONDS).completions
    expected = reference(torch.tensor([STORY])).logits[0, -1].log_softmax(-1)
    values, ids = expected.topk(3)
    assert [token for token, _ in made.logprobs[0].top] == ids.tolist()
    assert made.logprobs[0].logprob == pytest.approx(float(values[0]), abs=1e-4)


def test_stops(engine: runtime.Engine, reference: Any) -> None:
    whole = engine.submit(STORY, max_tokens=30).result(SECONDS)
    assert whole.completions[0].finish_reason == "length"
    chunks = list(engine.submit(STORY, max_tokens=30, stop=["little", "nothing"]))
    text = "".join(chunk.text for chunk in chunks)
    assert text == whole.text[: whole.text.index("little")]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", "little")
    ended = engine.submit(STORY, max_tokens=30, stop_token_ids=[whole.ids[6]]).result(SECONDS)
    assert ended.ids == whole.ids[:7]
    assert ended.completions[0].stop_reason == whole.ids[6]
    made = engine.generate(STORY, max_new_tokens=30, eos_token_id=[whole.ids[4], 2])
    assert made[0].tolist() == [*STORY, *whole.ids[:5]]


def test_a_text_and_its_stream_are_the_text_of_all_tokens(engine: runtime.Engine) -> None:
    ids = engine.generate("Once", max_new_tokens=12, do_sample=False)[0]
    text = engine.tokenizer.decode(ids, skip_special_tokens=True)
    stream = list(engine.stream("Once", max_new_tokens=12, do_sample=False))
    assert "Once" + "".join(stream) == text
    assert "Once" + engine.submit("Once", max_tokens=12).result(SECONDS).text == text


def test_a_request_that_is_cancelled_leaves_at_once(engine: runtime.Engine) -> None:
    handle = engine.submit(STORY, max_tokens=400, ignore_eos=True)
    first = next(iter(handle))  # the iterator is dropped after it
    assert first.ids
    with pytest.raises(RequestCancelled):
        handle.result(SECONDS)
    wait_until_idle(engine)
    waiting = engine.submit(STORY, max_tokens=400, ignore_eos=True)
    waiting.cancel()
    assert waiting.done
    assert len(engine.submit([1], max_tokens=3, temperature=0).result(SECONDS).ids) == 3


def test_threads_do_not_block_each_other(engine: runtime.Engine, reference: Any) -> None:
    made: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        pieces = engine.stream([1, 403 + number], max_new_tokens=20, do_sample=False)
        made[number] = list(pieces)

    slow = engine.stream(STORY, max_new_tokens=200, do_sample=False)
    assert next(slow)  # a consumer that stops here holds nobody up
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert made == {n: continue_alone(reference, [1, 403 + n], 20) for n in range(6)}
    slow.close()  # type: ignore[attr-defined]


def test_asyncio(engine: runtime.Engine, reference: Any) -> None:
    async def run() -> tuple[Any, ...]:
        one, two, three = await asyncio.gather(
            engine.agenerate(STORY, max_new_tokens=8, do_sample=False),
            engine.submit(STORY, max_tokens=8),
            engine.aforward(input_ids=torch.tensor([STORY])),
        )
        pieces = [piece async for piece in engine.astream("Once upon", max_new_tokens=4)]
        chunks = [chunk async for chunk in engine.submit(STORY, max_tokens=8)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.submit(STORY, max_tokens=500, ignore_eos=True), 0.2)
        return one[0].tolist(), two, three["logits"].shape, pieces, chunks

    ids, result, shape, pieces, chunks = asyncio.run(run())
    expected = continue_alone(reference, STORY, 8)
    assert ids == [*STORY, *expected]
    assert list(result.ids) == expected
    assert shape == (1, len(STORY), 512)
    assert "".join(pieces).startswith(" a time")
    assert list(itertools.chain(*(chunk.ids for chunk in chunks))) == expected
    wait_until_idle(engine)  # the one that was given up has left


def test_every_way_of_asking_gives_the_same(
    engine: runtime.Engine, reference: Any, tmp_path: Path, stories260k: Path, rank_pool: RankPool
) -> None:
    expected, text = continue_alone(reference, STORY, 5), "Once upon a time"
    found = whole_interface.ask_engine(engine, text)
    for answer in (found, asyncio.run(whole_interface.ask_engine_async(engine, text))):
        assert (answer["ids"], answer["generate"]) == (expected, [*STORY, *expected])
        assert text + answer["stream"] == engine.tokenizer.decode([*STORY, *expected][1:])
    assert [token for token, *_ in found["logprobs"]] == expected
    assert {index for index, *_ in found["sampled"]} == {0, 1}
    assert found["cancelled"]
    assert whole_interface.find_status(engine, top_k=2.5) == 400
    assert whole_interface.find_status(engine, max_tokens=400, timeout=0.01) == 504
    assert any("2 of 2 ranks" in line for line in whole_interface.describe_engine(engine))
    with run_stories(stories260k, tmp_path / "tp2", rank_pool, max_queue=1) as other:
        assert whole_interface.end_engine(other)
        assert whole_interface.find_status(other) == 503


def test_a_deadline_fails_one_request(engine: runtime.Engine) -> None:
    late = engine.submit(STORY, max_tokens=500, ignore_eos=True, timeout=0.3)
    good = engine.submit(STORY, max_tokens=20)
    with pytest.raises(RequestTimeout, match=r"^the request did not finish within 0.3 s$"):
        late.result(SECONDS)
    assert len(good.result(SECONDS).ids) == 20


def test_a_request_that_fails_by_its_own_options_fails_alone(engine: runtime.Engine) -> None:
    good = [engine.submit(STORY, max_tokens=20, temperature=0) for _ in range(3)]
    bad = engine.submit(STORY, max_tokens=20, temperature=1e-40, seed=1)
    with pytest.raises(RanksError, match="probability tensor contains"):
        bad.result(SECONDS)
    assert {len(handle.result(SECONDS).ids) for handle in good} == {20}


def test_a_full_queue_refuses_at_once(engine: runtime.Engine) -> None:
    handles: list[runtime.Handle] = []

    def fill() -> None:
        for _ in range(200):
            handles.append(engine.submit(STORY, max_tokens=100, ignore_eos=True))

    with pytest.raises(EngineBusy):
        fill()
    assert len(handles) < 90
    for handle in handles:
        handle.cancel()
    assert engine.submit([1], max_tokens=2, temperature=0).result(SECONDS)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([1], {"tempature": 1}, "tempature is no sampling parameter; did you mean temperature?"),
    ([1], {"temperature": float("nan")}, "temperature=nan: it must be a finite number from 0"),
    ([1], {"max_tokens": 2.5}, "max_tokens=2.5: it must be an integer from 1"),
    ([1], {"max_tokens": 512}, "the prompt has 1 tokens, and max_tokens is 512, but the model"),
    ([1], {"seed": 2**70}, "seed=1180591620717411303424: it must be an integer of 64 bits"),
    ([1], {"stop": [""]}, "stop=['']: it must be texts"),
    ([1], {"stop_token_ids": [1.5]}, "stop_token_ids: 1.5 is no token id"),
    ([1], {"n": 0}, "n=0: it must be an integer from 1"),
    ([1], {"n": 10**9}, "n=1000000000: the queue has room for 64 sequences"),
    ([1], {"timeout": 0}, "timeout=0: it must be above 0 seconds"),
    ([1], {"echo": True, "logprobs": 1}, "echo and logprobs"),
    ([], {}, "prompt: it has no tokens"),
    ([[1, 2], [3]], {}, "prompt: rows of 1 and 2 token ids"),
    (["a", "b"], {}, "prompt: a list of texts"),
    ([1, 512], {}, "prompt: token ids 1 to 512, but the vocabulary has 512"),
    ([5] * 600, {}, "prompt: 600 tokens, but the model has 512 positions"),
    (3.5, {}, "prompt: a float; give text or token ids"),
    ([{"role": "user", "content": "Hi"}], {}, "the folder's tokenizer has no chat template"),
]


@pytest.mark.parametrize(("prompt", "given", "words"), BAD, ids=[words for *_, words in BAD])
def test_what_no_engine_would_run_is_one_line_and_sends_nothing(
    prompt: Any, given: dict[str, Any], words: str, engine: runtime.Engine
) -> None:
    wait_until_idle(engine)
    before = engine.status().steps
    with pytest.raises(RequestError) as caught:
        engine.submit(prompt, **given)
    assert str(caught.value).startswith(words.rstrip())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ShardkitError)
    assert engine.status().steps == before
    assert engine.alive
