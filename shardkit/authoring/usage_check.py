"""Whether what a plan predicts is what its ranks use, measured as they run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.authoring.masked_sum import match_parameters
from shardkit.errors import MODEL_ERRORS
from shardkit.planning import (
    Collectives,
    KvCache,
    Plan,
    count_collectives,
    estimate_kv_cache,
    summarize_plan,
)
from shardkit.runtime.model_runner import Tensors
from shardkit.runtime.usage import Usage
from shardkit.verification.dummy_inputs import has_placeholders, make_inputs
from shardkit.verification.models import ShardedModel

PROMPT_TOKENS = 2  # fewer than any sliding window holds
ROUTED = "unknown: experts run one by one, with a sum for each that tokens are routed to"
DECODER = "decoder_"  # how arguments of a decoder begin
NONE = "none"  # how a plan's words begin if there is no cache, and not if it is unknown

Numbers = Sequence[int] | str  # a number for each rank, or why there is none


@dataclass(frozen=True, slots=True)
class Figure:
    """What a plan predicts on each rank, or why it does not, and what was measured there."""

    name: str
    predicted: Numbers
    measured: Sequence[int]

    @property
    def fault(self) -> str:
        """How the two differ; empty if they do not, or nothing is predicted."""
        if isinstance(self.predicted, str) or [*self.predicted] == [*self.measured]:
            return ""
        return f"{self.name}: the plan says {[*self.predicted]}, measured {[*self.measured]}"

    def to_json(self) -> dict[str, Any]:
        """It as JSON values."""
        return {"predicted": self.predicted, "measured": self.measured}


def compare_usage(
    plan: Plan, config: Mapping[str, Any], reference: PreTrainedModel, sharded: ShardedModel
) -> list[Figure]:
    """Run the loaded shards, and compare what each rank uses with the plan's numbers.

    Args:
        plan: The plan.
        config: The checkpoint's config.json.
        reference: The unsharded model.
        sharded: The ranks, with the shards loaded.
    """
    inputs = make_inputs(reference)
    prompt = make_prompt(reference, inputs)
    usages = sharded.measure(inputs, prompt)
    computed = count_computed_bytes(reference, plan)
    weights = [usage.weight_bytes - computed for usage in usages]
    collectives = count_collectives(plan, config)
    return [
        Figure("weight bytes", summarize_plan(plan).loaded_bytes, weights),
        *_compare_collectives(collectives, usages),
        *_compare_cache(estimate_kv_cache(plan, config), usages, prompt),
    ]


def make_prompt(model: PreTrainedModel, inputs: Tensors) -> Tensors:
    """A prompt of a few tokens of the inputs' text; all inputs if the model takes no text alone.

    Images that no token of the text stands for are among them: every token attends to them. Empty
    for a model that generates nothing, and for a decoder alone of another model's output, of which
    generate keeps no cache.
    """
    if not model.can_generate() or "encoder_hidden_states" in inputs:
        return {}
    if (ids := inputs.get("input_ids")) is not None:
        others = {} if has_placeholders(model, ids) else inputs
        images = {n: t[:1].clone() for n, t in others.items() if is_image(n, t, ids)}
        tokens = {
            n: t[:1]
            for n, t in others.items()
            if t.shape[:2] == ids.shape and t.is_floating_point()
        }
        short = {
            n: t[:, -PROMPT_TOKENS:].clone() for n, t in {**tokens, "input_ids": ids[:1]}.items()
        }
        prompt = {**short, **images}
        is_whole = model.main_input_name in prompt
        if is_whole and (model.config.is_encoder_decoder or _runs_on(model, prompt)):
            return prompt
    return {name: t[:1].clone() for name, t in inputs.items() if name != "decoder_input_ids"}


def is_image(name: str, tensor: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether an input is no text, nor an entry for each token of one."""
    return tensor.shape[:2] != ids.shape and not name.startswith(DECODER)


def _runs_on(model: PreTrainedModel, inputs: Tensors) -> bool:
    """Whether a model runs on these inputs alone."""
    try:
        with torch.inference_mode():
            model(**inputs)
    except MODEL_ERRORS:
        return False
    return True


def count_computed_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """The bytes of parameters that no checkpoint stores, since the model computes them."""
    stored = {
        model.get_parameter(name).untyped_storage().data_ptr()
        for name in match_parameters(model, plan)
    }
    parameters = [*model.parameters()]
    return sum(p.nbytes for p in parameters if p.untyped_storage().data_ptr() not in stored)


def _compare_collectives(predicted: Collectives, usages: Sequence[Usage]) -> list[Figure]:
    """Those of a generated token; of a forward pass, if there is none or an encoder runs in it."""
    num_ranks, figures = len(usages), list[Figure]()
    expected: Numbers
    per_token = {"all_reduce": predicted.all_reduces, "all_gather": predicted.all_gathers}
    for kind, count in per_token.items():
        steps = [usage.step for usage in usages if usage.step is not None]
        if not steps and not predicted.encoder:
            steps = [usage.forward for usage in usages]
        if steps:
            measured = [step[kind] for step in steps]
            unknown = predicted.is_routed and kind == "all_reduce"
            expected = ROUTED if unknown else [count] * num_ranks
            figures.append(Figure(f"{kind}s per token", expected, measured))
    if predicted.encoder:
        total = [predicted.all_reduces + predicted.encoder] * num_ranks
        expected = ROUTED if predicted.is_routed else total
        measured = [usage.forward["all_reduce"] for usage in usages]
        figures.append(Figure("all_reduces per prompt", expected, measured))
    return figures


def _compare_cache(
    predicted: KvCache | str, usages: Sequence[Usage], prompt: Tensors
) -> list[Figure]:
    """The bytes per token, and of a prompt that an encoder reads; nothing without a cache."""
    per_token = [usage.cache_bytes for usage in usages if usage.cache_bytes is not None]
    if not per_token:
        return []
    if isinstance(predicted, str):
        nothing = predicted.startswith(NONE)
        return [Figure("cache bytes", [0] * len(usages) if nothing else predicted, per_token)]
    figures = [Figure("cache bytes", predicted.rank_bytes, per_token)]
    ids = prompt.get("input_ids")
    is_text = ids is not None and all(t.shape[:2] == ids.shape for t in prompt.values())
    if predicted.is_crossed and is_text:
        positions = 1 + prompt["input_ids"].shape[1]  # the decoder's first, and the encoder's
        expected = [positions * nbytes for nbytes in predicted.rank_bytes]
        measured = [usage.prompt_cache_bytes or 0 for usage in usages]
        figures.append(Figure("cache bytes of a prompt", expected, measured))
    return figures
