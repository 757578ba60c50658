"""The two models that are compared: the unsharded one here, and the sharded one on its ranks."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shardkit.errors import CheckpointError
from shardkit.runtime.config import read_source_config
from shardkit.runtime.engine.controller import RankController
from shardkit.runtime.engine.messages import (
    forward_request,
    generate_request,
    load_request,
    trace_request,
)
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.loader import resolve_model_class
from shardkit.runtime.model_runner import Generation, ModelRunner, Tensors


class ShardedModel:
    """The model on its ranks, which this process started or torchrun did.

    Shapes: B batch, T tokens, S generated steps, V vocabulary.
    """

    def __init__(self, ranks: RankController) -> None:
        self.ranks = ranks

    def load(self, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
        """Load a shard folder, and return the dtype it has. Raises RanksError."""
        response = self.ranks.request(load_request(folder, dtype))[0]
        loaded: torch.dtype = getattr(torch, response.header["dtype"])
        return loaded

    def forward(self, inputs: Tensors) -> Tensors:
        """The floating-point outputs, by name. Raises RanksError."""
        return select_float_outputs(self.ranks.request(forward_request(inputs))[0].tensors)

    def generate(self, inputs: Tensors, steps: int, beams: int = 1) -> Generation:
        """Greedy decoding of S = `steps` tokens, or beam search, which has no logits."""
        request = generate_request(
            select_prompt(inputs), greedy_options(steps, beams), with_logits=beams == 1
        )
        return Generation(**self.ranks.request(request)[0].tensors)

    def trace(self, inputs: Tensors, modules: Iterable[str]) -> list[Tensors]:
        """What the named modules output on each rank, by name; under torchrun, on rank 0 alone."""
        return [r.tensors for r in self.ranks.request(trace_request(inputs, modules))]


class ReferenceModel:
    """The unsharded model, in this process, in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load it with transformers. Raises CheckpointError if weights are missing."""
        config = read_source_config(folder)
        model, info = resolve_model_class(config).from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        self.model = model.eval()
        choose_expert_kernel(self.model)
        if dtype == torch.float64:  # a few classes make parameters that stay float32
            for parameter in self.model.parameters():
                parameter.data = parameter.data.double()
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{folder}: {missing[0]} is not in the checkpoint")
        self._runner = ModelRunner(self.model, torch.device("cpu"))

    def forward(self, inputs: Tensors) -> Tensors:
        """The floating-point outputs, by name."""
        with self._sampling():
            return select_float_outputs(self._runner.forward(inputs))

    def generate(self, inputs: Tensors, steps: int, beams: int = 1) -> Generation:
        """Greedy decoding of S = `steps` tokens, or beam search, which has no logits."""
        prompt, options = select_prompt(inputs), greedy_options(steps, beams)
        with self._sampling():
            return self._runner.generate(prompt, options, with_logits=beams == 1)

    def trace(self, inputs: Tensors, modules: Iterable[str]) -> Tensors:
        """What the named modules output, by name, in the order they ran."""
        with self._sampling():
            return self._runner.trace(inputs, modules)

    def _sampling(self) -> AbstractContextManager[object]:
        is_wider = self.model.dtype == torch.float64
        return PromotedSampling() if is_wider else nullcontext()


class PromotedSampling(TorchFunctionMode):
    """Lets a float64 model that fixes its position table to float32 sample it at float64 places."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function; `grid_sample` with its table as wide as its places."""
        if func is functional.grid_sample:
            table, places, *rest = args
            args = (table.to(places.dtype), places, *rest)
        return func(*args, **(kwargs or {}))


def select_float_outputs(outputs: Tensors) -> Tensors:
    """The outputs that are compared: numbers, not ids."""
    return {name: value for name, value in outputs.items() if value.is_floating_point()}


def select_prompt(inputs: Tensors) -> Tensors:
    """Those inputs of a forward pass that generate takes, too."""
    return {name: value for name, value in inputs.items() if name != "decoder_input_ids"}


def greedy_options(steps: int, beams: int = 1) -> Mapping[str, Any]:
    """Generate exactly `steps` tokens: the likeliest one each time, or the likeliest sequence."""
    return {
        "do_sample": False,
        "num_beams": beams,
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "pad_token_id": 0,
    }
