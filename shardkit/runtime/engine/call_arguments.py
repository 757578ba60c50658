"""Which arguments of transformers' `generate` and `forward` an engine takes, and which run where.

Every argument is passed on as it is, or refused by name before anything is sent.
"""

import difflib
import numbers
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch

from shardkit.errors import RequestError

NO_CODE = "it is code, which is not sent to the ranks; use runtime.load under torchrun"
NO_CACHE = "caches stay on the ranks; leave it out"
REFUSED = {
    "logits_processor": NO_CODE,
    "stopping_criteria": NO_CODE,
    "prefix_allowed_tokens_fn": NO_CODE,
    "custom_generate": NO_CODE,
    "trust_remote_code": "code of a checkpoint is never run; leave it out",
    "assistant_model": "the ranks have one model; leave it out",
    "assistant_tokenizer": "the ranks have one model; leave it out",
    "streamer": "iterate over engine.stream",
    "tokenizer": "the ranks use the folder's own; leave it out",
    "max_time": "each rank would read a clock of its own; give submit a timeout",
    "past_key_values": NO_CACHE,
    "cache_params": NO_CACHE,
    "encoder_outputs": "give the encoder's inputs",
    "synced_gpus": "ranks of one model need it not; leave it out",
}
# Those that each row of a running batch has for itself.
ROW_OPTIONS = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "min_new_tokens",
}  # fmt: skip
OTHER_OPTIONS = {"max_new_tokens", "eos_token_id"}  # which the controller sees to
INTEGERS = ("max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_beams",
            "num_return_sequences")  # fmt: skip


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise RequestError for an argument that no engine takes, or a length that is no length."""
    for name, value in arguments.items():
        if name in REFUSED and value is not None:
            raise RequestError(f"{name}: {REFUSED[name]}")
        if name in INTEGERS and value is not None and not is_count(value):
            raise RequestError(f"{name}={value!r:.80}: it must be an integer from 0")
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if isinstance(ids, torch.Tensor) and ids.numel() == 0:
        raise RequestError("input_ids: the prompt has no tokens")
    tensors = [each for each in (ids, mask) if isinstance(each, torch.Tensor) and each.ndim == 2]
    if len({each.shape for each in tensors}) > 1:
        shapes = [list(each.shape) for each in tensors]
        raise RequestError(f"attention_mask: {shapes[1]}, but input_ids is {shapes[0]}")


def check_names(arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise RequestError for an argument of `generate` that is none of the known ones, if any."""
    for name, value in arguments.items():
        if known and name not in known and value is not None:
            raise RequestError(f"{name}: generate has no such argument{suggest_name(name, known)}")


def suggest_name(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: which one it resembles; "" if none."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def is_token_ids(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is token ids `[B, T]`."""
    is_plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_plain and not (value.ndim != 2 or value.is_floating_point() or value.is_meta)


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0, of Python's or numpy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def fits_row(options: Mapping[str, Any]) -> bool:
    """Whether a row of a running batch can have these options of `generate`, and no others."""
    plain = all(isinstance(v, int | float | bool | list) for v in options.values())
    return plain and options.keys() <= ROW_OPTIONS | OTHER_OPTIONS and "max_new_tokens" in options


def list_end_ids(value: Any) -> frozenset[int]:
    """The end tokens that `eos_token_id` names: None, an id, or several."""
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list | tuple) else [value])
