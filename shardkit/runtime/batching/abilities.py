"""What an engine must know of a model before it takes requests; every rank finds it out alike."""

import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from shardkit.errors import MODEL_ERRORS, RanksError, first_line
from shardkit.output.available_memory import measure_available_memory
from shardkit.runtime.batching.running_batch import measure_token_bytes
from shardkit.runtime.batching.support import (
    count_vocabulary,
    describe_obstacle,
    find_positions,
)
from shardkit.runtime.distributed.rank_environment import count_local_ranks
from shardkit.runtime.model_runner import ModelRunner, run_inference

# Of no signature: those of attention and losses, which every model passes on.
FURTHER_ARGUMENTS = {
    *TransformersKwargs.__optional_keys__,
    "decoder_input_ids",
    "debug_io",
    "mm_encoder_outputs",
}
SHARE = 0.5  # of the free memory, for the KV cache


@dataclass(frozen=True)
class Abilities:
    """What a loaded model can do.

    Attributes:
        failure: Why a forward pass over two tokens failed; "" if it did not, or was not possible.
        obstacle: Why sequences cannot join a running batch; "" if they can.
        generates: Whether it generates at all.
        has_encoder: Whether a prompt is an encoder's input, and not the beginning of the output.
        vocabulary: The number of tokens that its embedding has; None if it has none.
        positions: How many tokens a sequence may have; None if the config does not say.
        generation: Its generation config; empty if it does not generate.
        token_bytes: What each token of a sequence adds to this rank's cache, in bytes.
        cache_tokens: The tokens that this rank has room for.
        generate_arguments: The names that its `generate` takes; none if its class has its own
            `generate`, which takes what it likes.
    """

    failure: str
    obstacle: str
    generates: bool
    has_encoder: bool
    vocabulary: int | None
    positions: int | None
    generation: dict[str, Any]
    token_bytes: int
    cache_tokens: int
    generate_arguments: list[str]


def find_abilities(runner: ModelRunner) -> Abilities:
    """Run the model, and find out what it can do. Every rank must call it.

    Raises RanksError if a rank is lost.
    """
    model, device = runner.model, runner.device
    failure = _try_forward(runner)
    with run_inference(model.dtype):
        obstacle = describe_obstacle(model, device)
        token_bytes = 0 if obstacle else measure_token_bytes(model, device)
    generates = model.can_generate()
    return Abilities(
        failure,
        obstacle,
        generates,
        bool(model.config.is_encoder_decoder),
        count_vocabulary(model),
        find_positions(model),
        read_generation_config(model) if generates else {},
        token_bytes,
        int(SHARE * measure_free_memory(device)) // max(1, token_bytes),
        list_generate_arguments(model) if generates else [],
    )


def read_generation_config(model: PreTrainedModel) -> dict[str, Any]:
    """A model's generation config as JSON values."""
    config = model._prepare_generation_config(None)[0]
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def list_generate_arguments(model: PreTrainedModel) -> list[str]:
    """The names that transformers' common `generate` takes for a model; none for another one.

    They are what `_validate_model_kwargs` of transformers lets pass, and a generation config's.
    """
    if type(model).generate is not GenerationMixin.generate:
        return []
    names = {*vars(GenerationConfig()), *vars(model.generation_config), *FURTHER_ARGUMENTS}
    for act in (GenerationMixin.generate, model.prepare_inputs_for_generation, model.forward):
        names |= inspect.signature(act).parameters.keys()
    if model.config.is_encoder_decoder:
        places = [model, getattr(model, model.base_model_prefix, None)]
        for prefix, part in (("", "encoder"), ("decoder_", "decoder")):
            for module in filter(None, (getattr(place, part, None) for place in places)):
                parameters = inspect.signature(module.forward).parameters
                names |= {prefix + name for name in parameters}
    return sorted(name for name in names if not name.startswith("_"))


def _try_forward(runner: ModelRunner) -> str:
    """Run two tokens, if that is what the model reads. Raises RanksError if a rank is lost."""
    if runner.model.main_input_name != "input_ids" or runner.model.config.is_encoder_decoder:
        return ""
    try:
        runner.forward({"input_ids": torch.tensor([[1, 2]])})
    except RanksError:
        raise
    except MODEL_ERRORS as error:
        return first_line(error)
    return ""


def measure_free_memory(device: torch.device) -> int:
    """The bytes that are free on a device; on a CPU, this process's share of them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return measure_available_memory() // count_local_ranks()
