"""Runs one transformers model: forward, generate (beam search included) and trace.

A rank's worker and the unsharded reference of verification run their models by this class alone.
Shapes: B batch, T tokens, S generated steps, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin

from shardkit.runtime.layers.joint_sum import separate_sums

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Generation:
    """What a model has generated.

    Attributes:
        ids: Token ids `[B, T]`, int64; those of the prompt come first for a decoder.
        logits: What each generated token was chosen from, `[B, S, V]`; None unless asked for.
    """

    ids: torch.Tensor
    logits: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that there are, by field name."""
        return {"ids": self.ids} | ({} if self.logits is None else {"logits": self.logits})


class ModelRunner:
    """One model on one device; everything runs without gradients."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device

    def forward(
        self, inputs: Tensors, options: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run a forward pass.

        Args:
            inputs: The model's input tensors, by argument name: `input_ids` `[B, T]`, and so on.
            options: Further arguments of the model's forward; None means no cache.

        Returns:
            The output tensors, by name.
        """
        with run_inference(self.model.dtype):
            return select_tensors(self._call(inputs, options))

    def generate(
        self,
        inputs: Tensors,
        options: Mapping[str, Any],
        *,
        seed: int | None = None,
        with_logits: bool = False,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteria | None = None,
    ) -> Generation:
        """Generate tokens, as transformers' `generate` does.

        Args:
            inputs: The prompt's tensors, by argument name.
            options: Arguments of `generate`: `max_new_tokens`, `do_sample`, `num_beams`, ...
            seed: Seeds torch before sampling.
            with_logits: Also return the logits of each step.
            streamer: Receives each step's token ids.
            stopping: Is asked after each step whether to stop.
        """
        arguments = {**move_inputs(inputs, self.model, self.device), **options}
        if type(self.model).generate is not GenerationMixin.generate:
            arguments.pop("pad_token_id", None)  # a class's own generate may state it, too
        # Stated each time: a few classes keep what the call before asked for.
        arguments |= {"output_logits": with_logits, "return_dict_in_generate": with_logits}
        if streamer is not None:
            arguments["streamer"] = streamer
        if stopping is not None:
            arguments["stopping_criteria"] = StoppingCriteriaList([stopping])
        with run_inference(self.model.dtype), seed_random(seed, self.device):
            output = self.model.generate(**arguments)
        if not with_logits:
            return Generation(output)
        return Generation(output.sequences, torch.stack(output.logits, 1))

    def call(
        self,
        method: str,
        arguments: Mapping[str, Any],
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteria | None = None,
    ) -> Any:
        """Call the model's `forward` or `generate` as it is called elsewhere.

        Args:
            method: Which of them.
            arguments: Its arguments; tensors are moved to the model's device.
            seed: Seeds torch for the call.
            streamer: Receives each step's token ids.
            stopping: Is asked after each step whether to stop.

        Returns:
            What it returns.
        """
        tensors = {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor)}
        given = {**arguments, **move_inputs(tensors, self.model, self.device)}
        if streamer is not None:
            given["streamer"] = streamer
        if stopping is not None:
            given["stopping_criteria"] = StoppingCriteriaList([stopping])
        act = self.model if method == "forward" else self.model.generate
        with run_inference(self.model.dtype), seed_random(seed, self.device):
            return act(**given)

    def trace(
        self, inputs: Tensors, modules: Iterable[str], options: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run a forward pass, and return the first output of each named module, in run order."""
        with run_inference(self.model.dtype), ModuleOutputs(self.model, modules) as outputs:
            self._call(inputs, options)
        return outputs.tensors

    def _call(self, inputs: Tensors, options: Mapping[str, Any] | None) -> Any:
        arguments = no_cache_options(self.model) if options is None else options
        return self.model(**move_inputs(inputs, self.model, self.device), **arguments)


class ModuleOutputs:
    """In a `with`, `tensors` collects the first output tensor of each named module, by name.

    If there are any, modules whose outputs are summed over the ranks together are so one by one.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        names = [*names]
        modules = dict(model.named_modules())
        self._separate = separate_sums(model.modules() if names else ())
        self._hooks = [
            modules[name].register_forward_hook(self._recorder(name))
            for name in names
            if name in modules
        ]

    def __enter__(self) -> "ModuleOutputs":
        self._separate.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._separate.__exit__(kind, error, traceback)
        for hook in self._hooks:
            hook.remove()

    def _recorder(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and name not in self.tensors:
                self.tensors[name] = first.detach().clone()

        return record


def no_cache_options(model: PreTrainedModel) -> dict[str, object]:
    """The options of a forward pass without a cache; none for a model that never has one."""
    has_option = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if has_option else {}


def move_inputs(
    inputs: Tensors, model: PreTrainedModel, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inputs on a device, floating-point ones (pixels, audio) in the model's own dtype."""
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def select_tensors(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output, by name, without nested ones (caches, hidden states)."""
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}


@contextmanager
def seed_random(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch, and go on where the random numbers were after it; None does neither."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def run_inference(dtype: torch.dtype) -> Iterator[None]:
    """No gradients; for a float64 model, float64 constants, which models create as they run."""
    default = torch.get_default_dtype()
    if dtype == torch.float64:
        torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(default)
