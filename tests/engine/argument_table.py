"""Arguments of `generate` and `forward`, each run on an engine and on the unsharded model."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from shardkit import runtime
from shardkit.errors import RequestError, ShardkitError

IDS = torch.tensor([[1, 403, 407, 261]])
TWO = torch.tensor([[1, 403, 407, 261], [0, 0, 1, 403]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
RETURNED = {**GREEDY, "return_dict_in_generate": True}
SAMPLED = {"max_new_tokens": 6, "do_sample": True}
Case = tuple[torch.Tensor, dict[str, Any]]
GENERATE: dict[str, Case] = {
    "max_new_tokens": (IDS, GREEDY),
    "max_length": (IDS, {"max_length": 9, "do_sample": False}),
    "no length at all": (IDS, {"do_sample": False}),
    "min_new_tokens": (IDS, {**GREEDY, "min_new_tokens": 6, "eos_token_id": 378}),
    "eos_token_id": (IDS, {**GREEDY, "eos_token_id": [378, 2]}),
    "pad_token_id": (TWO, {**GREEDY, "pad_token_id": 0}),
    "attention_mask": (TWO, {**GREEDY, "attention_mask": MASK}),
    "num_beams": (IDS, {**GREEDY, "num_beams": 3}),
    "num_return_sequences": (IDS, {**GREEDY, "num_beams": 3, "num_return_sequences": 2}),
    "length_penalty": (IDS, {**GREEDY, "num_beams": 3, "length_penalty": 2.0}),
    "early_stopping": (IDS, {**GREEDY, "num_beams": 3, "early_stopping": True}),
    "repetition_penalty": (IDS, {**GREEDY, "repetition_penalty": 1.4}),
    "no_repeat_ngram_size": (IDS, {**GREEDY, "no_repeat_ngram_size": 2}),
    "bad_words_ids": (IDS, {**GREEDY, "bad_words_ids": [[378], [432, 383]]}),
    "suppress_tokens": (IDS, {**GREEDY, "suppress_tokens": [378]}),
    "sequence_bias": (IDS, {**GREEDY, "sequence_bias": [[[378], -10.0]]}),
    "use_cache": (IDS, {**GREEDY, "use_cache": False}),
    "prompt_lookup_num_tokens": (IDS, {**GREEDY, "prompt_lookup_num_tokens": 2}),
    "return_dict_in_generate": (IDS, RETURNED),
    "output_scores": (IDS, {**RETURNED, "output_scores": True}),
    "output_logits": (TWO, {**RETURNED, "output_logits": True, "attention_mask": MASK}),
    "output_hidden_states": (IDS, {**RETURNED, "output_hidden_states": True}),
    "generation_config": (IDS, {"generation_config": GenerationConfig(**GREEDY)}),
    "temperature": (IDS, {**SAMPLED, "temperature": 0.5}),
    "top_k": (IDS, {**SAMPLED, "top_k": 3}),
    "top_p": (IDS, {**SAMPLED, "top_p": 0.6}),
    "min_p": (IDS, {**SAMPLED, "min_p": 0.2}),
    "typical_p": (IDS, {**SAMPLED, "typical_p": 0.5}),
    "several rows sampled": (TWO, {**SAMPLED, "attention_mask": MASK}),
    "cache_implementation": (IDS, {**GREEDY, "cache_implementation": "static"}),
    "position_ids": (IDS, {**GREEDY, "position_ids": torch.arange(3, 7)[None]}),
}
REFUSED: dict[str, Any] = {
    "logits_processor": [abs], "stopping_criteria": [abs], "prefix_allowed_tokens_fn": abs,
    "custom_generate": abs, "assistant_model": object(), "streamer": object(),
    "tokenizer": object(), "max_time": 1.0, "past_key_values": object(), "synced_gpus": True,
    "num_beams": 2.5, "bad_words_ids": [object()],
}  # fmt: skip
FORWARD: dict[str, dict[str, Any]] = {
    "input_ids": {"input_ids": IDS},
    "attention_mask": {"input_ids": TWO, "attention_mask": MASK},
    "position_ids": {"input_ids": IDS, "position_ids": torch.arange(3, 7)[None]},
    "labels, one tensor twice": {"input_ids": IDS, "labels": IDS},
    "logits_to_keep": {"input_ids": IDS, "logits_to_keep": 2},
    "output_hidden_states": {"input_ids": IDS, "output_hidden_states": True},
    "return_dict": {"input_ids": IDS, "return_dict": False},
    "use_cache": {"input_ids": IDS, "use_cache": False},
    "inputs_embeds": {"inputs_embeds": torch.linspace(-1, 1, 256).view(1, 4, 64)},
}


def compare_table(engine: runtime.Engine, model: PreTrainedModel) -> dict[str, str]:
    """What each argument does on the engine: "equal", "refused", or how it differs."""
    differences = {}
    for name, (ids, options) in GENERATE.items():
        torch.manual_seed(11)
        with warnings.catch_warnings(action="ignore"):
            expected = model.generate(ids, **options)
        try:
            actual = engine.generate(ids, seed=11, **options)
        except ShardkitError as error:
            actual = str(error)
        differences[f"generate {name}"] = describe_difference(actual, expected)
    for name, value in REFUSED.items():
        try:
            engine.generate(IDS, **{**GREEDY, name: value})
            differences[f"refused {name}"] = "accepted"
        except RequestError as error:
            is_named = str(error).startswith(name) and "\n" not in str(error)
            differences[f"refused {name}"] = "equal" if is_named else str(error)
    for name, inputs in FORWARD.items():
        with torch.inference_mode():
            expected = model(**inputs)
        differences[f"forward {name}"] = describe_difference(engine.forward(**inputs), expected)
    return differences


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
