"""Bodies of requests: whatever their fields are, they are used, or refused in one line."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from shardkit.errors import RequestError
from shardkit.serve import ServeOptions
from shardkit.serve.embeddings import encode_vector, list_inputs
from shardkit.serve.generation_request import CHAT, COMPLETION, NEUTRAL, read_chat, read_completion
from shardkit.serve.http_errors import describe_error, find_status
from shardkit.serve.request_guard import choose_id, split_host

OPTIONS = ServeOptions(model="m")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(sorted(COMPLETION | CHAT | set(NEUTRAL))) | st.text(max_size=6)


def find_refusal(act: Callable[[], object]) -> RequestError | HTTPException | None:
    try:
        act()
    except (RequestError, HTTPException) as refusal:
        return refusal
    return None


@given(fields=st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_body_is_read_or_refused_in_one_line(fields: dict[str, Any]) -> None:
    message = {"role": "user", "content": "hi"}
    for read, base in ((read_completion, {"prompt": "a"}), (read_chat, {"messages": [message]})):
        refused = find_refusal(partial(read, {**base, **fields}, OPTIONS))
        if refused is not None:
            assert find_status(refused) in (400, 404)
            assert "\n" not in describe_error(refused)["error"]["message"]


@given(value=VALUES)
def test_any_input_of_embeddings_is_listed_or_refused(value: Any) -> None:
    refused = find_refusal(lambda: list_inputs(value, 64))
    assert refused is None or str(refused).startswith("input")


def test_no_field_is_dropped() -> None:
    asked = read_completion(
        {"prompt": [1, 2], "max_tokens": 3, "stop": "x", "logprobs": 2, "user": "me", "seed": None,
         "frequency_penalty": 0, "n": 2, "stream": True, "stream_options": {"include_usage": True}},
        OPTIONS,
    )  # fmt: skip
    assert asked.prompts == ([1, 2],)
    assert (asked.params.max_tokens, asked.params.stop, asked.params.n) == (3, ("x",), 2)
    assert (asked.params.logprobs, asked.stream, asked.with_usage) == (2, True, True)
    for name in NEUTRAL:
        with pytest.raises(RequestError, match=f"^{name}: this server does not support it"):
            read_completion({"prompt": "a", name: "other"}, OPTIONS)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5}
    asked = read_chat({**chat, "logprobs": True, "top_logprobs": 3}, OPTIONS)
    assert (asked.params.max_tokens, asked.params.logprobs) == (5, 3)
    assert read_chat(chat, OPTIONS).params.logprobs is None
    with pytest.raises(RequestError, match=r"^top_logprobs: it needs logprobs"):
        read_chat({**chat, "top_logprobs": 3}, OPTIONS)


def test_an_error_that_nobody_has_foreseen_shows_nothing() -> None:
    error = describe_error(KeyError("secret"))["error"]
    assert (error["code"], "secret" in error["message"]) == (500, False)


def test_hosts_and_ids_are_read_strictly() -> None:
    assert [split_host(h) for h in ("a.b:80", "[::1]:80", "LOCALHOST", "")] == [
        "a.b", "::1", "localhost", "",
    ]  # fmt: skip
    assert choose_id("a-1.b_2") == "a-1.b_2"
    for bad in ("", "a b", "a\nb", "x" * 65, "a;b"):
        assert len(choose_id(bad)) == 32
    assert encode_vector([1.0], "base64") == "AACAPw=="
