"""What users have tried that once hung the caller, or ended the engine for everyone.

Each is an answer, or an error of one line that names the argument; and the engine goes on.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardkit import runtime
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import RequestError
from tests.helpers.stories_engine import STORY, run_stories, wait_until_idle

EXPECTED = [432, 383, 286, 261]  # that greedy decoding gives
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
IDS = torch.tensor([STORY])
NUMBERS: Any = np.array(STORY)
TEXTS: Any = ["a", "b"]


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, stories260k: Path, rank_pool: RankPool
) -> Iterator[runtime.Engine]:
    folder = tmp_path_factory.mktemp("refused") / "tp2"
    with run_stories(stories260k, folder, rank_pool, max_queue=64) as started:
        yield started


TAKEN: dict[str, Callable[[runtime.Engine], Any]] = {
    "a tensor twice": lambda e: e.forward(input_ids=IDS, labels=IDS)["loss"] and EXPECTED,
    "a numpy scalar": lambda e: e.generate(STORY, **GREEDY, num_beams=np.int64(1))[0, 5:],
    "a set": lambda e: e.generate(STORY, **GREEDY, suppress_tokens={5, 6})[0, 5:],
    "a numpy prompt": lambda e: e.generate(NUMBERS, **GREEDY)[0, 5:],
    "what a tokenizer gives": lambda e: e.generate(
        e.tokenizer("Once upon a time", return_tensors="pt"), **GREEDY
    )[0, 5:],
    "a stream of what a tokenizer gives": lambda e: list(
        e.stream(e.tokenizer("Once upon a time", return_tensors="pt"), **GREEDY)
    ),
    "a stream of lists in a mapping": lambda e: list(e.stream({"input_ids": [STORY]}, **GREEDY)),
    "stop_strings": lambda e: e.generate(
        "Once upon", max_new_tokens=9, do_sample=False, stop_strings=[" time"]
    )[0, -1:].tolist() == [378] and EXPECTED,
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[runtime.Engine], Any], str]] = {
    "beams of a stream": (lambda e: list(e.stream(STORY, num_beams=2)), "num_beams: a stream is"),
    "a dict of a stream": (
        lambda e: list(e.stream(STORY, return_dict_in_generate=True)),
        "return_dict_in_generate: a stream returns tokens",
    ),
    "a stream of a ragged list": (lambda e: list(e.stream([[1, 2], [3]])), "prompt: rows of 1"),
    "a stream of texts": (lambda e: list(e.stream(TEXTS)), "prompt: a list of texts"),
    "a stream of two rows": (lambda e: list(e.stream([[1], [2]])), "prompt: 2 rows; a stream is"),
    "no tokens": (lambda e: e.generate([]), "prompt: it has no tokens"),
    "half a token": (lambda e: e.generate(STORY, max_new_tokens=2.5), "max_new_tokens=2.5: it"),
    "a mask of another length": (
        lambda e: e.generate(IDS, attention_mask=torch.ones(1, 3), **GREEDY),
        "attention_mask: [1, 3], but input_ids is [1, 5]",
    ),
    "a prompt beyond the positions": (lambda e: e.generate([5] * 600), "prompt: 600 tokens, but"),
    "a pass beyond the positions": (
        lambda e: e.forward(input_ids=torch.ones(1, 600, dtype=torch.long)),
        "prompt: 600 tokens, but",
    ),
    "a tensor of no values": (
        lambda e: e.forward(input_ids=IDS, position_ids=torch.ones(1, 5, device="meta")),
        "position_ids: a tensor without values",
    ),
    "token ids of no values": (
        lambda e: e.forward(input_ids=torch.ones(1, 5, dtype=torch.long, device="meta")),
        "input_ids: a tensor without values",
    ),
    "a prompt of no values": (
        lambda e: e.generate(None, input_ids=IDS.to("meta"), **GREEDY),
        "input_ids: a tensor without values",
    ),
    "sparse token ids": (
        lambda e: e.generate(None, input_ids=IDS.to_sparse(), **GREEDY),
        "input_ids: a tensor without values",
    ),
    "a misspelt option": (
        lambda e: e.generate(STORY, max_new_tokns=4),
        "max_new_tokns: generate has no such argument; did you mean max_new_tokens?",
    ),
    "a misspelt option of a stream": (
        lambda e: list(e.stream(STORY, tempature=0.5)),
        "tempature: generate has no such argument; did you mean temperature?",
    ),
    "an argument of another model": (
        lambda e: e.generate(STORY, pixel_values=torch.ones(1, 3, 2, 2)),
        "pixel_values: generate has no such argument",
    ),
    "a sparse tensor": (
        lambda e: e.forward(input_ids=IDS, attention_mask=torch.ones(1, 5).to_sparse()),
        "attention_mask: a tensor without values",
    ),
    "a clock": (lambda e: e.generate(STORY, max_time=1.0), "max_time: each rank would read"),
    "code": (lambda e: e.generate(STORY, logits_processor=[abs]), "logits_processor: it is code"),
    "an object": (lambda e: e.generate(STORY, bad_words_ids=[object()]), "bad_words_ids: a object"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_not_json_is_taken_all_the_same(name: str, engine: runtime.Engine) -> None:
    assert list(TAKEN[name](engine)) == EXPECTED


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name(name: str, engine: runtime.Engine) -> None:
    call, words = REFUSED[name]
    steps = engine.status().steps
    with pytest.raises(RequestError) as caught:
        call(engine)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    wait_until_idle(engine)
    assert (engine.alive, engine.status().steps) == (True, steps)


def test_a_consumer_that_raises_frees_its_place(engine: runtime.Engine) -> None:
    def consume() -> None:
        for token in engine.stream(STORY, max_new_tokens=400, do_sample=False):
            assert token / 0

    with pytest.raises(ZeroDivisionError):
        consume()
    wait_until_idle(engine)
    assert engine.generate(STORY, **GREEDY)[0, 5:].tolist() == EXPECTED
