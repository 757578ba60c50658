"""Calls of `generate` and `forward`, each run on an engine and on the unsharded model."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from shardkit import runtime
from shardkit.errors import RequestError, ShardkitError, first_line
from shardkit.runtime.config import read_source_config
from shardkit.runtime.engine.prompts import has_tokenizer, load_tokenizer
from shardkit.runtime.rank_shard import resolve_model_class
from shardkit.verification.dummy_inputs import make_inputs
from tests.engine.forward_table import CACHES, NO_VALUE, list_forward
from tests.engine.generate_table import GREEDY, OWN, REFUSED, list_generate

SEED = 11
TEXT = "Once upon a"
Calls = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Reference:
    """An unsharded model, and what its generate needs.

    Attributes:
        model: The model, to be run.
        tokenizer: Its tokenizer; None if it has none.
        row: What one row of a generate needs.
    """

    model: PreTrainedModel
    tokenizer: Any
    row: dict[str, torch.Tensor]

    def list_generate_calls(self) -> Calls:
        """Calls of generate by the argument that each is about."""
        if not self.model.can_generate():
            return {}
        ids = self.model.generate(**self.row, **GREEDY)[0].tolist()
        return list_generate(self.row, ids[-GREEDY["max_new_tokens"] :])

    def list_forward_calls(self) -> Calls:
        """Calls of forward by the argument that each is about."""
        return list_forward(self.model, inspect.signature(self.model.forward).parameters)

    def list_missing(self) -> set[str]:
        """The arguments of transformers' own calls that the tables do not have."""
        missing = set(inspect.signature(self.model.forward).parameters)
        missing -= OWN | CACHES | NO_VALUE | self.list_forward_calls().keys()
        if self.model.can_generate():
            names = {*vars(GenerationConfig()), *inspect.signature(self.model.generate).parameters}
            rows = self.list_generate_calls().keys() | REFUSED.keys() | OWN
            missing |= {name for name in names if not name.startswith("_")} - rows
        return missing


def load_reference(source: Path) -> Reference:
    """The model of a checkpoint."""
    kind = resolve_model_class(read_source_config(source))
    model = kind.from_pretrained(source).eval().requires_grad_(False)
    if has_tokenizer(source) and model.can_generate():
        tokenizer = load_tokenizer(source)
        return Reference(model, tokenizer, dict(tokenizer(TEXT, return_tensors="pt")))
    inputs = make_inputs(model)
    size = len(inputs["input_ids"])
    rows = {name: each[: len(each) // size] for name, each in inputs.items()}
    row = {name: each for name, each in rows.items() if not name.startswith("decoder_")}
    return Reference(model, None, row)


def compare_generates(engine: runtime.Engine, reference: Reference) -> dict[str, str]:
    """What each argument of generate does on the engine: "equal", or how it differs."""
    differences = {}
    for name, call in reference.list_generate_calls().items():
        if name != "stop_strings" or reference.tokenizer is not None:
            differences[f"generate {name}"] = compare_generate(engine, reference, call)
    for name, value in REFUSED.items() if reference.model.can_generate() else ():
        call = {**reference.row, name: value}
        differences[f"refused {name}"] = describe_refusal(engine, call, name)
    return differences


def compare_forwards(engine: runtime.Engine, reference: Reference) -> dict[str, str]:
    """What each argument of forward does on the engine: "equal", or how it differs."""
    differences = {}
    for name, call in reference.list_forward_calls().items():
        expected = run_call(partial(reference.model, **call))
        actual = run_call(partial(engine.forward, **call))
        differences[f"forward {name}"] = compare_outcomes(actual, expected)
    return differences


def list_differences(outcomes: Mapping[str, str]) -> dict[str, str]:
    """Those arguments that are not equal."""
    return {name: how for name, how in outcomes.items() if how != "equal"}


def run_call(call: Callable[[], Any]) -> Any:
    """What a call returns or raises; what it warns of is not the question."""
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
        try:
            return call()
        except Exception as error:  # a refusal is an outcome, whatever its kind
            return error


def compare_generate(engine: runtime.Engine, reference: Reference, call: dict[str, Any]) -> str:
    """How one generate on the engine differs from that of the unsharded model."""
    model, own = reference.model, {}
    if "stop_strings" in call:  # the engine has the folder's tokenizer, and takes no other
        own = {"tokenizer": reference.tokenizer}
    before = model.generation_config.to_dict()
    torch.manual_seed(SEED)
    expected = run_call(partial(model.generate, **call, **own))
    model.generation_config = GenerationConfig.from_dict(before)
    others = {name: value for name, value in call.items() if name != "input_ids"}
    actual = run_call(partial(engine.generate, call.get("input_ids"), seed=SEED, **others))
    return compare_outcomes(actual, expected)


def compare_outcomes(actual: Any, expected: Any) -> str:
    """ "equal" for the same values or the same refusal; else how they differ."""
    if isinstance(actual, Exception) != isinstance(expected, Exception):
        return f"{actual!r:.200} instead of {expected!r:.200}"
    if not isinstance(expected, Exception):
        return describe_difference(actual, expected)
    # A model that fails in the middle of a layer says what sizes that layer has.
    words = type(expected).__name__ + ": ", first_line(expected)[:60]
    same = isinstance(actual, ShardkitError) and any(each in str(actual) for each in words)
    return "equal" if same else f"{actual!r:.200} instead of {expected!r:.200}"


def describe_refusal(engine: runtime.Engine, call: dict[str, Any], name: str) -> str:
    """ "equal" if an argument is refused by name, in one line."""
    ids = call.pop("input_ids")
    error = run_call(lambda: engine.generate(ids, **call))
    is_named = isinstance(error, RequestError) and str(error).startswith(name)
    return "equal" if is_named and "\n" not in str(error) else f"{error!r:.200}"


def describe_difference(actual: Any, expected: Any) -> str:
    """ "equal", or where a value differs from what transformers returns, caches left out."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
            return f"{getattr(actual, 'shape', actual)} instead of {expected.shape}"
        if not actual.is_floating_point():
            return "equal" if torch.equal(actual, expected) else f"{actual} instead of {expected}"
        pairs = zip(actual.flatten().tolist(), expected.flatten().tolist(), strict=True)
        same = all(a == b or math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) for a, b in pairs)
        return "equal" if same else f"by {float((actual - expected).abs().max())}"
    if isinstance(expected, Mapping):
        kept = {k: v for k, v in expected.items() if not isinstance(v, Cache)}
        if not isinstance(actual, Mapping) or list(actual) != list(kept):
            return f"{actual} instead of {list(kept)}"
        actual, expected = list(actual.values()), list(kept.values())
    if isinstance(expected, list | tuple):
        expected = [each for each in expected if not isinstance(each, Cache)]
        if len(actual) != len(expected):
            return f"{len(actual)} instead of {len(expected)}"
        differences = [describe_difference(a, b) for a, b in zip(actual, expected, strict=True)]
        return next((each for each in differences if each != "equal"), "equal")
    return "equal" if actual == expected else f"{actual} instead of {expected}"
