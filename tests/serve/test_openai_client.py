"""OpenAI's own client, over real ranks: what it gets is what the unsharded model says."""

import asyncio
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import openai
import pytest
from transformers import AutoModelForCausalLM

from shardkit import runtime
from shardkit.authoring.rank_pool import RankPool
from shardkit.serve import ServeOptions
from tests.helpers.http_server import serve_engine
from tests.helpers.stories_engine import run_stories, wait_until_idle

KEY = "key-of-this-test"
MODEL = "stories"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
SECONDS = 60.0


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, stories260k: Path, rank_pool: RankPool
) -> Iterator[runtime.Engine]:
    folder = tmp_path_factory.mktemp("serve") / "tp2"
    with run_stories(stories260k, folder, rank_pool, 80, TEMPLATE) as started:
        yield started


@pytest.fixture(scope="module")
def address(engine: runtime.Engine) -> Iterator[str]:
    options = ServeOptions(
        model=MODEL, api_key=KEY, hosts=frozenset({"127.0.0.1"}), request_timeout=SECONDS,
        max_body_bytes=100_000,
    )  # fmt: skip
    with serve_engine(engine, options) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def reference(stories260k: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories260k).eval().requires_grad_(False)


def answer_alone(reference: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The text that the unsharded model adds to a prompt, by itself."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = reference.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
    before, whole = (
        tokenizer.decode(each, skip_special_tokens=True) for each in (made[: ids.shape[1]], made)
    )
    return str(whole[len(before) :])


def send(
    address: str, path: str, body: Any = None, key: str = KEY, **headers: str
) -> tuple[int, Any, Any]:
    """Status, headers and body of an answer; JSON if it is that."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"authorization": f"Bearer {key}", "content-type": "application/json", **headers}
    request = urllib.request.Request(address + path, data, given)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            status, found, text = answer.status, answer.headers, answer.read()
    except HTTPError as error:
        with error:
            status, found, text = error.code, error.headers, error.read()
    is_json = found.get("content-type", "").startswith("application/json")
    return status, found, json.loads(text) if is_json else text.decode()


def test_sixty_four_requests_at_once_get_what_the_unsharded_model_says(
    address: str, engine: runtime.Engine, reference: Any
) -> None:
    words = ["Once upon a time", "The dog", "Lily and Tom went to the park and", "A", "Sam saw"]
    asked = [(words[n % 5] + " big" * (n % 3), 4 + 5 * n % 23, n) for n in range(64)]

    async def ask(client: openai.AsyncOpenAI, prompt: str, tokens: int, kind: int) -> str:
        options: dict[str, Any] = {"model": MODEL, "max_tokens": tokens, "temperature": 0}
        message: Any = {"role": "user", "content": prompt}
        if kind % 4 == 0:
            whole = await client.completions.create(prompt=prompt, **options)
            return str(whole.choices[0].text)
        if kind % 4 == 1:
            stream = await client.completions.create(prompt=prompt, stream=True, **options)
            return "".join([part.choices[0].text async for part in stream])
        if kind % 4 == 2:
            answer = await client.chat.completions.create(messages=[message], **options)
            return str(answer.choices[0].message.content)
        parts: Any = await client.chat.completions.create(
            messages=[message], stream=True, **options
        )
        return "".join([part.choices[0].delta.content or "" async for part in parts])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(ask(client, *each) for each in asked))

    made = asyncio.run(run())
    expected = [answer_alone(reference, engine.tokenizer, text, size) for text, size, _ in asked]
    assert made == expected
    wait_until_idle(engine)


def test_options_of_a_completion(client: openai.OpenAI, engine: runtime.Engine) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(prompt="Once upon", **asked)
    text = plain.choices[0].text
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (3, 12)
    assert plain.choices[0].finish_reason == "length"
    several = client.completions.create(prompt=["Once upon", "The"], n=2, **asked)
    assert [each.index for each in several.choices] == [0, 1, 2, 3]
    assert [each.text for each in several.choices[:2]] == [text, text]
    echo = client.completions.create(prompt="Once upon", echo=True, **asked)
    assert echo.choices[0].text == "Once upon" + text
    ended = client.completions.create(prompt="Once upon", stop=[text[8:12]], **asked)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (text[:8], "stop")
    ids = engine.input_ids("Once upon")[0].tolist()
    by_ids = client.completions.create(
        prompt=[ids], logprobs=2, extra_body={"return_token_ids": True}, **asked
    ).choices[0]
    assert by_ids.text == text
    made = engine.submit(ids, max_tokens=12, temperature=0, logprobs=2).result(SECONDS)
    assert by_ids.model_extra is not None
    assert by_ids.model_extra["token_ids"] == list(made.ids)
    assert by_ids.logprobs is not None
    logprobs = [each.logprob for each in made.completions[0].logprobs]
    assert by_ids.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    seeded = [
        client.completions.create(prompt="The", model=MODEL, seed=3, temperature=1, max_tokens=8)
        for _ in range(2)
    ]
    assert seeded[0].choices[0].text == seeded[1].choices[0].text
    assert seeded[0].choices[0].text == (
        engine.submit("The", seed=3, temperature=1, max_tokens=8).result(SECONDS).text
    )


def test_a_stream_says_whose_message_it_is_and_what_it_used(client: openai.OpenAI) -> None:
    parts = list(
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Once"}], max_tokens=5, n=2,
            temperature=0, logprobs=True, top_logprobs=2, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert [p.choices[0].delta.role for p in parts[:2]] == ["assistant"] * 2
    assert parts[-1].usage is not None
    assert (parts[-1].usage.completion_tokens, parts[-1].choices) == (10, [])
    ends = [p.choices[0] for p in parts[:-1] if p.choices[0].finish_reason]
    assert sorted((each.index, each.finish_reason) for each in ends) == [
        (0, "length"), (1, "length"),
    ]  # fmt: skip
    described = [c for p in parts[2:-1] for c in p.choices if c.logprobs]
    assert len(described) == 10
    assert described[0].logprobs is not None
    assert described[0].logprobs.content is not None
    assert len(described[0].logprobs.content[0].top_logprobs) == 2


LONG = {"prompt": [1], "max_tokens": 500, "ignore_eos": True}
REFUSED: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "no JSON": (b"{", 400, "the body is no JSON: "),
    "no object": (b"[]", 400, "the body is no JSON object"),
    "long": (b" " * 100_001, 413, "the body is longer than 100000 bytes"),
    "no prompt": ({}, 400, "prompt: it must be a text"),
    "unknown": ({"prompt": "a", "tempature": 1}, 400, "tempature: there is no such field"),
    "unsupported": ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias: this server does"),
    "range": ({"prompt": "a", "top_p": 7}, 400, "top_p=7: it must be a number above 0, at most 1"),
    "model": ({"prompt": "a", "model": "other"}, 404, "the model 'other' is not served here"),
    "many": ({"prompt": ["a"] * 65}, 400, "prompt: 65, of at most 64 in a request"),
    "choices": ({"prompt": "a", "n": 17}, 400, "n=17: it must be at most 16"),
    "too long": ({"prompt": [5] * 600}, 400, "prompt: 600 tokens, but the model has 512 positions"),
    "switch": ({"prompt": "a", "stream": 1}, 400, "stream=1: it must be true or false"),
    "busy": ({**LONG, "n": 16, "prompt": [[1]] * 7}, 429, "80 sequences wait, of at most 80; try"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_has_a_status_and_one_line(
    name: str, address: str, engine: runtime.Engine
) -> None:
    body, status, words = REFUSED[name]
    found, headers, answer = send(address, "/v1/completions", body)
    assert found == status, answer
    assert answer["error"]["message"].startswith(words)
    assert "\n" not in answer["error"]["message"]
    assert headers["x-request-id"]
    wait_until_idle(engine)


def test_a_request_that_takes_too_long_fails_alone(engine: runtime.Engine) -> None:
    options = ServeOptions(model=MODEL, request_timeout=0.05)
    with serve_engine(engine, options) as address:
        status, _, answer = send(address, "/v1/completions", LONG)
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        text = send(address, "/v1/completions", {**LONG, "stream": True})[2]
        assert '"code": 504' in text.strip().splitlines()[-1]  # and no [DONE]
    wait_until_idle(engine)


def test_who_may_ask_and_for_what(address: str) -> None:
    assert send(address, "/v1/models")[2]["data"][0]["id"] == MODEL
    status, headers, answer = send(address, "/v1/models", key="wrong")
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert answer["error"]["type"] == "authentication_error"
    for path in ("/v1/completions", "/metrics", "/status"):
        assert send(address, path, key="")[0] == 401
    assert send(address, "/health", key="")[::2] == (200, {"status": "ok"})
    assert send(address, "/health", host="elsewhere.example")[0] == 403
    assert send(address, "/v1/nothing")[0] == 404
    assert send(address, "/v1/completions")[0] == 405
    kind = {"content-type": "text/plain"}
    assert send(address, "/v1/completions", {"prompt": "a"}, **kind)[0] == 415
    asked = {"x-request-id": "mine-1"}
    assert send(address, "/health", **asked)[1]["x-request-id"] == "mine-1"
    page = send(address, "/", key="")
    assert page[0] == 200
    assert "script-src 'self'" in page[1]["content-security-policy"]
    assert 'src="/page.js"' in page[2]
    assert send(address, "/page.js", key="")[0] == send(address, "/page.css", key="")[0] == 200


def test_a_client_that_goes_away_frees_its_place(address: str, engine: runtime.Engine) -> None:
    port = int(address.rpartition(":")[2])
    for stream in (True, False):
        body = json.dumps({**LONG, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with closing(socket.create_connection(("127.0.0.1", port))) as sock:
            sock.sendall(head.encode() + body)
            end = time.monotonic() + SECONDS
            while engine.status().running == 0 and time.monotonic() < end:
                time.sleep(0.005)
        before = engine.status().tokens
        wait_until_idle(engine)
        assert engine.status().tokens - before < 300


def test_metrics_and_status_count(address: str, client: openai.OpenAI) -> None:
    def read(name: str) -> float:
        lines = send(address, "/metrics")[2].splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[1])

    before = read("shardkit_completion_tokens_total")
    client.completions.create(model=MODEL, prompt="Once", max_tokens=7, temperature=0)
    assert read("shardkit_completion_tokens_total") == before + 7
    path = 'shardkit_requests_total{path="/v1/completions",status="200"}'
    assert read(path) >= 1
    assert read("shardkit_request_seconds_count") >= 2
    status = send(address, "/status")[2]
    assert (status["model"], status["tp_size"], status["alive"]) == (MODEL, 2, True)
    assert [rank["memory"] > 10**7 for rank in status["ranks"]] == [True, True]
