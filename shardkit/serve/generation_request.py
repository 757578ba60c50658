"""From the JSON of a completion or a chat to prompts and sampling parameters.

A field is used, or neutral, or refused by name: nothing that a client asks for is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from shardkit.errors import RequestError
from shardkit.runtime import SamplingParams
from shardkit.serve.serve_options import ServeOptions
from shardkit.strict_json import escape_line

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop",
    "stop_token_ids", "max_tokens", "n", "ignore_eos",
)  # fmt: skip
COMMON = {*SAMPLING, "model", "stream", "stream_options", "return_token_ids", "user", "metadata"}
COMPLETION = COMMON | {"prompt", "echo", "logprobs"}
CHAT = COMMON | {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}
# Fields of OpenAI's API that change nothing with these values, and are refused with any other.
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": "",
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False,
    "parallel_tool_calls": True, "modalities": ["text"],
}  # fmt: skip


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks to be generated.

    Attributes:
        prompts: Texts, lists of token ids, or lists of chat messages.
        params: How each is generated.
        stream: Whether chunks are sent as they come.
        with_usage: Whether a stream ends with the number of tokens.
        with_ids: Whether token ids are returned, too.
    """

    prompts: tuple[Any, ...]
    params: SamplingParams
    stream: bool
    with_usage: bool
    with_ids: bool


def read_completion(body: Mapping[str, Any], options: ServeOptions) -> GenerationRequest:
    """The request of a completion's body. Raises RequestError or HTTPException."""
    fields = check_fields(body, COMPLETION, options)
    params = {"echo": fields.get("echo", False), "logprobs": fields.get("logprobs")}
    return _make_request(fields, _list_prompts(fields.get("prompt")), params, options)


def read_chat(body: Mapping[str, Any], options: ServeOptions) -> GenerationRequest:
    """The request of a chat's body. Raises RequestError or HTTPException."""
    fields = check_fields(body, CHAT, options)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: it must be a list of chat messages that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError("messages: each must be an object with a role and a content")
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if not read_switch(fields, "logprobs"):
        if "top_logprobs" in fields:
            raise RequestError("top_logprobs: it needs logprobs to be true")
        return _make_request(fields, (messages,), {}, options)
    return _make_request(fields, (messages,), {"logprobs": fields.get("top_logprobs", 0)}, options)


def check_fields(body: Mapping[str, Any], known: set[str], options: ServeOptions) -> dict[str, Any]:
    """The fields that are given; null is as if left out. Raises as `read_completion` does."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in NEUTRAL and value != NEUTRAL[name] and value not in ("", [], {}):
            raise RequestError(f"{name}: this server does not support it; leave it out")
        if name not in known and name not in NEUTRAL:
            listed = ", ".join(sorted(known))
            raise RequestError(f"{escape_line(name, 80)}: there is no such field: {listed}")
    model = fields.get("model", options.model)
    if model != options.model:
        raise HTTPException(404, f"the model {model!r:.80} is not served here; {options.model} is")
    return fields


def read_switch(fields: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false. Raises RequestError."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name}={value!r:.80}: it must be true or false")
    return value


def _make_request(
    fields: Mapping[str, Any], prompts: tuple[Any, ...], more: Mapping[str, Any],
    options: ServeOptions,
) -> GenerationRequest:  # fmt: skip
    if len(prompts) > options.max_prompts:
        raise RequestError(f"prompt: {len(prompts)}, of at most {options.max_prompts} in a request")
    params = SamplingParams(**{n: fields[n] for n in SAMPLING if n in fields}, **more)
    if params.n > options.max_choices:
        raise RequestError(f"n={params.n}: it must be at most {options.max_choices}")
    if len(params.stop) > options.max_stops:
        raise RequestError(f"stop: {len(params.stop)} texts, of at most {options.max_stops}")
    extra = fields.get("stream_options", {})
    if not isinstance(extra, dict) or set(extra) - {"include_usage"}:
        raise RequestError("stream_options: it must be an object with include_usage alone")
    return GenerationRequest(
        prompts, params, read_switch(fields, "stream"), read_switch(extra, "include_usage"),
        read_switch(fields, "return_token_ids"),
    )  # fmt: skip


def _list_prompts(prompt: Any) -> tuple[Any, ...]:
    """One prompt or several: texts, or lists of token ids."""
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, Sequence) or not prompt:
        raise RequestError("prompt: it must be a text, a list of token ids, or a list of those")
    if all(isinstance(each, int) for each in prompt):
        return (prompt,)
    if all(isinstance(each, str | list) for each in prompt):
        return tuple(prompt)
    raise RequestError("prompt: a list must be of token ids, of texts, or of lists of token ids")
