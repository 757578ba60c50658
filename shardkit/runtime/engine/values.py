"""Arguments and results of a model's calls as JSON and tensors, so that they travel unpickled.

A value becomes a JSON value in which each tensor is a number: {"tensor": 0}. What transformers'
`forward` and `generate` take and return can be sent, but for code and caches.
"""

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from shardkit.errors import RequestError

Tensors = dict[str, torch.Tensor]
PLAIN = (bool, int, float, str, type(None))


def pack_value(value: Any, tensors: Tensors, name: str) -> Any:
    """A value as JSON; its tensors are added to `tensors`.

    Args:
        value: Tensors, numbers, texts, dtypes and generation configs, nested in any way.
        tensors: What has been packed so far.
        name: What an error calls it.

    Raises:
        RequestError: A part of it is neither; the message names it.
    """
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, tensors, name)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, GenerationConfig):
        return {"generation_config": pack_value(value.to_dict(), tensors, name)}
    if isinstance(value, Mapping):
        items = [[pack_value(k, tensors, name), pack_value(v, tensors, str(k))]
                 for k, v in value.items()]  # fmt: skip
        return {"dict": items}
    for kind, words in ((list, "list"), (tuple, "tuple"), (set | frozenset, "set")):
        if isinstance(value, kind):
            return {words: [pack_value(inner, tensors, name) for inner in value]}
    raise RequestError(
        f"{name}: a {type(value).__name__} cannot be sent to the ranks; give tensors, numbers and"
        " texts, or use runtime.load under torchrun"
    )


def unpack_value(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `pack_value` has packed; any mapping as a dict."""
    if isinstance(value, PLAIN):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensors[str(content)]
        case "dtype":
            return getattr(torch, content)
        case "generation_config":
            return GenerationConfig.from_dict(unpack_value(content, tensors))
        case "dict":
            return {unpack_value(k, tensors): unpack_value(v, tensors) for k, v in content}
    values = [unpack_value(inner, tensors) for inner in content]
    return {"list": list, "tuple": tuple, "set": set}[kind](values)


def pack_output(output: Any, tensors: Tensors) -> Any:
    """What a model has returned as JSON, without its caches, which stay on the ranks."""
    return pack_value(_remove_caches(output), tensors, "output")


def _remove_caches(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _remove_caches(v) for k, v in value.items() if not isinstance(v, Cache)}
    if isinstance(value, list | tuple):
        kept = [_remove_caches(v) for v in value if not isinstance(v, Cache)]
        return tuple(kept) if isinstance(value, tuple) else kept
    return value


def _pack_tensor(value: torch.Tensor, tensors: Tensors, name: str) -> dict[str, int]:
    if value.device.type == "meta" or value.layout != torch.strided:
        raise RequestError(f"{name}: a tensor without values of its own cannot be sent")
    tensors[str(len(tensors))] = value
    return {"tensor": len(tensors) - 1}
