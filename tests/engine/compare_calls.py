"""Calls of `generate` and `forward`, each run on an engine and on the unsharded model."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from shardkit import runtime
from shardkit.errors import RequestError, ShardkitError, first_line
from shardkit.verification.dummy_inputs import make_inputs
from tests.engine.forward_table import CACHES, NO_VALUE, list_forward
from tests.engine.generate_table import GREEDY, OWN, REFUSED, list_generate

SEED = 11
IDS = {"input_ids": torch.tensor([[1, 403, 407, 261]])}  # that stories260K knows
Calls = dict[str, dict[str, Any]]


def compare_table(
    engine: runtime.Engine, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor] | None = None
) -> dict[str, str]:
    """What each argument does on the engine: "equal", or how it differs.

    Args:
        engine: What runs the shards.
        model: The same model, unsharded.
        inputs: One row of what its generate needs; None for those of any such model.
    """
    differences = {}
    if model.can_generate():
        for name, call in list_generate_calls(model, inputs).items():
            differences[f"generate {name}"] = compare_generate(engine, model, call)
        row = first_row(model) if inputs is None else inputs
        for name, value in REFUSED.items():
            differences[f"refused {name}"] = describe_refusal(engine, {**row, name: value}, name)
    for name, call in list_forward_calls(model).items():
        expected = run_call(lambda call=call: model(**call))
        actual = run_call(lambda call=call: engine.forward(**call))
        differences[f"forward {name}"] = compare_outcomes(actual, expected)
    return differences


def first_row(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model of any kind needs, of its first text, without what generate makes itself."""
    made = make_inputs(model)
    size = len(made["input_ids"])
    rows = {name: each[: len(each) // size] for name, each in made.items()}
    return {name: each for name, each in rows.items() if not name.startswith("decoder_")}


def list_generate_calls(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor] | None = None
) -> Calls:
    """Calls of generate by the argument that each is about."""
    row = first_row(model) if inputs is None else inputs
    made = model.generate(**row, **GREEDY)[0].tolist()
    return list_generate(row, made[-GREEDY["max_new_tokens"] :])


def list_forward_calls(model: PreTrainedModel) -> Calls:
    """Calls of forward by the argument that each is about."""
    return list_forward(model, inspect.signature(model.forward).parameters)


def list_missing(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor] | None) -> set[str]:
    """The arguments of transformers' own calls that the tables do not have."""
    missing = inspect.signature(model.forward).parameters.keys() - OWN - CACHES - NO_VALUE
    missing -= list_forward_calls(model).keys()
    if model.can_generate():
        names = {*vars(GenerationConfig()), *inspect.signature(model.generate).parameters}
        rows = list_generate_calls(model, inputs).keys() | REFUSED.keys() | OWN
        missing |= {name for name in names if not name.startswith("_")} - rows
    return missing


def run_call(call: Callable[[], Any]) -> Any:
    """What a call returns or raises; what it warns of is not the question."""
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
        try:
            return call()
        except Exception as error:  # a refusal is an outcome, whatever its kind
            return error


def compare_generate(engine: runtime.Engine, model: PreTrainedModel, call: dict[str, Any]) -> str:
    """How one generate on the engine differs from that of the unsharded model."""
    before = model.generation_config.to_dict()
    torch.manual_seed(SEED)
    expected = run_call(lambda: model.generate(**call))
    model.generation_config = GenerationConfig.from_dict(before)
    others = {name: value for name, value in call.items() if name != "input_ids"}
    actual = run_call(lambda: engine.generate(call.get("input_ids"), seed=SEED, **others))
    return compare_outcomes(actual, expected)


def compare_outcomes(actual: Any, expected: Any) -> str:
    """ "equal" for the same values or the same refusal; else how they differ."""
    if isinstance(actual, Exception) != isinstance(expected, Exception):
        return f"{actual!r:.200} instead of {expected!r:.200}"
    if not isinstance(expected, Exception):
        return describe_difference(actual, expected)
    same = isinstance(actual, ShardkitError) and first_line(expected)[:60] in str(actual)
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
