"""The two models that are compared: the unsharded one here, and the sharded one on its ranks."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

from shardkit import config_fields as fields
from shardkit.checkpoint import Checkpoint
from shardkit.errors import CheckpointError, first_line
from shardkit.recipe.formats import group_checkpoint
from shardkit.runtime.config import GENERATION_CONFIG, read_source_config
from shardkit.runtime.engine.controller import RankController
from shardkit.runtime.engine.messages import (
    forward_request,
    generate_request,
    load_request,
    measure_request,
    trace_request,
)
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.load_options import LoadOptions
from shardkit.runtime.model_runner import Generation, ModelRunner, Tensors
from shardkit.runtime.rank_shard import resolve_model_class
from shardkit.runtime.usage import Usage
from shardkit.verification.plain_weights import compute_plain_weights

DECODER_INPUTS = ("decoder_input_ids", "encoder_hidden_states")  # which generate makes itself


class ShardedModel:
    """The model on its ranks, which this process started or torchrun did.

    Shapes: B batch, T tokens, S generated steps, V vocabulary.
    """

    def __init__(self, ranks: RankController) -> None:
        self.ranks = ranks

    def load(self, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
        """Load a shard folder, and return the dtype it has. Raises RanksError."""
        response = self.ranks.request(load_request(folder, LoadOptions(dtype)))[0]
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

    def measure(self, inputs: Tensors, prompt: Tensors) -> list[Usage]:
        """What each rank uses: in a forward pass, and, unless `prompt` is empty, as it goes on."""
        responses = self.ranks.request(measure_request(inputs, prompt))
        return [Usage(**response.header["usage"]) for response in responses]


class ReferenceModel:
    """The unsharded model, in this process, in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load it with transformers.

        Raises CheckpointError if that fails or a weight is missing, and RecipeError if it is
        quantized as no format describes.
        """
        config = read_source_config(folder)
        model_class = resolve_model_class(config)
        try:
            model, info = model_class.from_pretrained(
                **locate_weights(folder), config=config, dtype=dtype, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        except Exception as fault:  # whatever it is: the class, the config and the files are given
            raise CheckpointError(_describe_load_failure(folder, config, fault)) from None
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
        with self._promoting():
            return select_float_outputs(self._runner.forward(inputs))

    def generate(self, inputs: Tensors, steps: int, beams: int = 1) -> Generation:
        """Greedy decoding of S = `steps` tokens, or beam search, which has no logits."""
        prompt, options = select_prompt(inputs), greedy_options(steps, beams)
        with self._promoting():
            return self._runner.generate(prompt, options, with_logits=beams == 1)

    def trace(self, inputs: Tensors, modules: Iterable[str]) -> Tensors:
        """What the named modules output, by name, in the order they ran."""
        with self._promoting():
            return self._runner.trace(inputs, modules)

    def _promoting(self) -> AbstractContextManager[object]:
        is_wider = self.model.dtype == torch.float64
        return PromotedArguments() if is_wider else nullcontext()


PROMOTED = (
    functional.grid_sample,
    functional.linear,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.matmul,
)


class PromotedArguments(TorchFunctionMode):
    """Lets a float64 model compute with what its code fixes to float32: a table, or some heads.

    A float32 table that is filled with the least float64 number gets its own least.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function; of two tensors, the narrower one as wide as the other."""
        if func in PROMOTED:
            first, second, *rest = args
            dtype = torch.promote_types(first.dtype, second.dtype)
            args = (first.to(dtype), second.to(dtype), *rest)
        elif func is torch.Tensor.fill_ and len(args) == 2 and isinstance(args[1], float):
            table, value = args
            args = (table, clamp_to_range(value, table.dtype))
        return func(*args, **(kwargs or {}))


def clamp_to_range(value: float, dtype: torch.dtype) -> float:
    """The number of a dtype's range that is nearest; of infinite ones, the number itself."""
    if not dtype.is_floating_point or not math.isfinite(value):
        return value
    limits = torch.finfo(dtype)
    return max(min(value, limits.max), limits.min)


def locate_weights(folder: Path) -> dict[str, Any]:
    """Where transformers takes a checkpoint's weights from, as arguments of `from_pretrained`.

    The folder, or if transformers cannot read its files or its names as they are, the tensors
    themselves, mapped from the files that the checkpoint is made of. Quantized weights are computed
    by another path than the runtime's.
    """
    with Checkpoint(folder) as checkpoint:
        files, prefix = [file.name for file in checkpoint.files], checkpoint.wrapper_prefix
        grouping = group_checkpoint(checkpoint.specs(), checkpoint.config)
        if checkpoint.has_usual_files and not prefix and not grouping.weights:
            return {"pretrained_model_name_or_path": folder}
    stored = {name: t for file in files for name, t in load_file(folder / file).items()}
    weights = compute_plain_weights(stored, grouping)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if not (folder / GENERATION_CONFIG).exists():
        return {"pretrained_model_name_or_path": None, "state_dict": tensors}
    generation = GenerationConfig.from_pretrained(folder)
    return {
        "pretrained_model_name_or_path": None,
        "state_dict": tensors,
        "generation_config": generation,
    }


def _describe_load_failure(folder: Path, config: Any, fault: Exception) -> str:
    """Why transformers does not load a checkpoint, in one line, and what its config may have to do
    with it."""
    text = f"{folder}: transformers cannot load it: {type(fault).__name__}: {first_line(fault)}"
    if quantized := [name for name in fields.QUANTIZATION if getattr(config, name, None)]:
        text += f"; config.json has {quantized[0]}: correct it if the weights are not quantized"
    return text


def select_float_outputs(outputs: Tensors) -> Tensors:
    """The outputs that are compared: numbers, not ids."""
    return {name: value for name, value in outputs.items() if value.is_floating_point()}


def select_prompt(inputs: Tensors) -> Tensors:
    """Those inputs of a forward pass that generate takes, too."""
    return {name: value for name, value in inputs.items() if name not in DECODER_INPUTS}


def greedy_options(steps: int, beams: int = 1) -> Mapping[str, Any]:
    """Generate exactly `steps` tokens: the likeliest one each time, or the likeliest sequence."""
    return {
        "do_sample": False,
        "num_beams": beams,
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "pad_token_id": 0,
    }
