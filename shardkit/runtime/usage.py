"""What a model uses as it runs, measured: weights, cache and collectives."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers.generation.utils import ALL_CACHE_NAMES, GenerationMixin

from shardkit.runtime.model_runner import ModelRunner, Tensors
from shardkit.runtime.packed import iter_stored

SUMMED_BIAS = "summed_bias"  # a bias that was loaded, and is added after the sum over ranks
STEPS = 3  # tokens to generate: the prompt's pass, and two of one token each


@dataclass(frozen=True, slots=True)
class Usage:
    """What one rank's model uses.

    Attributes:
        weight_bytes: Its parameters and the buffers that checkpoints store, each once.
        forward: The collectives of a pass over whole inputs, by kind.
        step: Those of one generated token; None if the model generates nothing.
        cache_bytes: What one further token adds to the cache of one sequence; None likewise.
        prompt_cache_bytes: The cache of one sequence after its prompt; None likewise.
    """

    weight_bytes: int
    forward: Mapping[str, int]
    step: Mapping[str, int] | None = None
    cache_bytes: int | None = None
    prompt_cache_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """It as JSON values."""
        return asdict(self)


def measure_usage(
    runner: ModelRunner, counts: dict[str, int], inputs: Tensors, prompt: Tensors
) -> Usage:
    """Run a model, and count what it uses.

    Args:
        runner: The model.
        counts: How many collectives its group has made, by kind; reset here.
        inputs: The inputs of a forward pass.
        prompt: The inputs of generate; empty for a model that is not to generate.
    """
    counts.update(dict.fromkeys(counts, 0))
    runner.forward(inputs)
    weights, forward = count_weight_bytes(runner.model), dict(counts)
    if not prompt:
        return Usage(weights, forward)
    options = {
        "do_sample": False, "num_beams": 1, "max_new_tokens": STEPS, "min_new_tokens": STEPS,
        "pad_token_id": 0, "use_cache": True,
    }  # fmt: skip
    with _CallRecorder(runner.model, counts) as recorder:
        runner.generate(prompt, options)
    first, *_, before, last = recorder.calls
    step = {name: last.counts[name] - before.counts[name] for name in counts}
    return Usage(weights, forward, step, last.cache_bytes - before.cache_bytes, first.cache_bytes)


def count_weight_bytes(model: nn.Module) -> int:
    """The bytes in memory of a model's parameters and stored buffers, tied ones once."""
    tensors = [*model.state_dict(keep_vars=True).values()]
    tensors += [t for name, t in model.named_buffers() if name.endswith(SUMMED_BIAS)]
    stored = (each for tensor in tensors for each in iter_stored(tensor))
    storages = [tensor.untyped_storage() for tensor in stored]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True, slots=True)
class _Call:
    """How much there was after a call of a model."""

    counts: dict[str, int]
    cache_bytes: int


class _CallRecorder:
    """In a `with`, `calls` gets an entry after each call of the model that generates.

    A model may leave that to one inside of it, which it does not call itself.
    """

    def __init__(self, model: nn.Module, counts: Mapping[str, int]) -> None:
        self._calls: dict[str, list[_Call]] = {}
        self._counts = counts
        self._hooks = [
            module.register_forward_hook(partial(self._record, name))
            for name, module in model.named_modules()
            if isinstance(module, GenerationMixin)
        ]

    @property
    def calls(self) -> list[_Call]:
        """Those of the outermost model that was called."""
        return self._calls[min(self._calls, key=len)]

    def __enter__(self) -> "_CallRecorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        call = _Call(dict(self._counts), count_cache_bytes(output))
        self._calls.setdefault(name, []).append(call)


def count_cache_bytes(output: Any) -> int:
    """The bytes of the cache in a model's output, without the integers that count its tokens."""
    caches = [getattr(output, name, None) for name in ALL_CACHE_NAMES]
    tensors = {id(tensor): tensor for cache in caches for tensor in _iter_tensors(cache, set())}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.is_floating_point())


def _iter_tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor inside of a value, whatever holds it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        attributes = list(getattr(value, "__dict__", {}).values())
        items = list(value.values()) if isinstance(value, Mapping) else attributes
        values = list(value) if isinstance(value, list | tuple) else items
        for inner in values:
            yield from _iter_tensors(inner, seen)
