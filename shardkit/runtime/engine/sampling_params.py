"""How one request is generated: parameters named as vLLM and transformers name them."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardkit.errors import RequestError
from shardkit.runtime.engine.call_arguments import suggest_name

MAX_LOGPROBS = 20
SEEDS = 1 << 63  # of torch.Generator, which takes 64 bits
NO_LIMIT = (-1, 0)  # of top_k, as vLLM and transformers have it
Range = tuple[float, float, str]
FLOATS: dict[str, Range] = {
    "temperature": (0.0, math.inf, "a finite number from 0"),
    "top_p": (1e-9, 1.0, "a number above 0, at most 1"),
    "min_p": (0.0, 1.0, "a number from 0 to 1"),
    "repetition_penalty": (1e-9, math.inf, "a finite number above 0"),
}
INTEGERS: dict[str, Range] = {
    "top_k": (-1, math.inf, "an integer from 1; 0 or -1 for no limit"),
    "seed": (-SEEDS, SEEDS - 1, "an integer of 64 bits"),
    "max_tokens": (1, math.inf, "an integer from 1"),
    "logprobs": (0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}"),
    "n": (1, math.inf, "an integer from 1"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is generated. What is None is as the model's generation config has it.

    Decoding is greedy with temperature 0, and samples with a higher one. Without a temperature it
    samples if the generation config says so, or if top_k, top_p, min_p or seed is given.

    Args:
        temperature: What the logits are divided by; 0 is greedy decoding.
        top_k: How many of the most probable tokens are sampled from; 0 or -1 is all of them.
        top_p: The probability of the most probable tokens that are sampled from.
        min_p: The least probability of a token, as a fraction of the most probable one's.
        repetition_penalty: What the logits of tokens that have occurred are divided by.
        seed: Makes sampling repeatable; sequence i of n is that of seed + i.
        stop: Texts, or one, before which generation ends. They need a tokenizer.
        stop_token_ids: Ids with which generation ends, next to the model's own.
        max_tokens: The greatest number of new tokens; without it, the generation config's, and
            never more than fit the model's positions.
        logprobs: Report each token's log-probability, and that of so many most probable ones.
        n: How many sequences to generate.
        echo: Whether the text begins with the prompt.
        ignore_eos: Whether to go on after the model's own end of a sequence.

    Raises:
        RequestError: A value is not one of those allowed; the message names it.

    Example:
        >>> SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64).n
        1
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    logprobs: int | None = None
    n: int = 1
    echo: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, limits in FLOATS.items():
            self._set(name, _check_number(name, getattr(self, name), limits, numbers.Real, float))
        for name, limits in INTEGERS.items():
            value = _check_number(name, getattr(self, name), limits, numbers.Integral, int)
            self._set(name, 1 if name == "n" and value is None else value)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        is_list = isinstance(stop, Sequence)
        if not is_list or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop={self.stop!r}: it must be texts that are not empty")
        self._set("stop", tuple(stop))
        ids = _list_integers("stop_token_ids", self.stop_token_ids or ())
        self._set("stop_token_ids", ids)
        for name in ("echo", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r}: it must be True or False")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo and logprobs: a prompt has no logprobs; leave one of them out")

    def to_options(self) -> dict[str, Any]:
        """What is given, as arguments of transformers' `generate`; lengths and stops left out."""
        options: dict[str, Any] = {}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        limits = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given = {name: value for name, value in limits.items() if value is not None}
        if self.top_k in NO_LIMIT:
            given["top_k"] = 0
        if self.temperature == 0:
            return options | {"do_sample": False}
        if self.temperature is not None or given or self.seed is not None:
            options |= {"do_sample": True, **given}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        return options

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def make_params(params: SamplingParams | None, given: Mapping[str, Any]) -> SamplingParams:
    """Parameters given as an object or by name.

    Raises:
        RequestError: Both are given, or a name is not one of `SamplingParams`; the message says
            which one it resembles.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params={params!r:.80}: it must be SamplingParams")
    if params is not None and given:
        raise RequestError(f"params and {next(iter(given))}: give SamplingParams, or names alone")
    names = [field.name for field in fields(SamplingParams)]
    for name in given:
        if name not in names:
            hint = suggest_name(name, names) or f"; there are {', '.join(names)}"
            raise RequestError(f"{name} is no sampling parameter{hint}")
    return params or SamplingParams(**given)


def _check_number(name: str, value: Any, limits: Range, kind: Any, convert: Any) -> Any:
    """A plain number in its range, or None. Raises RequestError."""
    if value is None:
        return None
    low, high, words = limits
    if isinstance(value, kind) and not isinstance(value, bool):
        plain = convert(value)
        if low <= plain <= high and math.isfinite(plain):
            return plain
    raise RequestError(f"{name}={value!r:.80}: it must be {words}")


def _list_integers(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | set | frozenset):
        raise RequestError(f"{name}={values!r:.80}: it must be a list of token ids")
    for value in values:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
            raise RequestError(f"{name}: {value!r:.80} is no token id, an integer from 0")
    return tuple(int(value) for value in values)
