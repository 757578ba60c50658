"""Whether a model's sequences can join a running batch: by what it is, then by trying it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from shardkit.errors import MODEL_ERRORS, RanksError, first_line
from shardkit.runtime.batching.cache_layers import find_unjoinable, has_recurrent_state
from shardkit.runtime.batching.running_batch import RunningBatch, has_argument, make_rows
from shardkit.runtime.model_runner import ModelRunner, run_inference

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Rotary embeddings whose frequencies depend on the longest row of a batch.
LENGTH_DEPENDENT = {"dynamic", "longrope"}
# What `generate` calls and `RunningBatch` does in transformers' common way.
COMMON = (
    "generate", "_prepare_position_ids_for_generation", "_update_model_kwargs_for_generation",
    "_get_logits_processor", "_prepare_generated_length",
)  # fmt: skip
PROBE_LENGTHS = (7, 4)  # tokens of the two prompts that are tried
PROBE_STEPS = 5
# The largest difference of logits, in units of their standard deviation, that rounding explains.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


def describe_obstacle(model: PreTrainedModel, device: torch.device) -> str:
    """Why sequences cannot join a running batch of this model, in a few words; "" if they can.

    Every rank must call it: it generates.
    """
    try:
        return _find_obstacle(model) or _try_joining(model, device)
    except RanksError:
        raise
    except MODEL_ERRORS as error:
        return f"a trial failed: {first_line(error)}"


def _find_obstacle(model: PreTrainedModel) -> str:
    if not model.can_generate():
        return "it does not generate"
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    own = [name for name in COMMON if getattr(type(model), name) is not _common(name)]
    if own:
        return f"its class has its own {own[0]}"
    if model.main_input_name != "input_ids" or not has_argument(model, "attention_mask"):
        return "its forward takes no input_ids with an attention_mask"
    config = model._prepare_generation_config(None)[0]
    if config.cache_implementation == "static":
        return "its cache has a fixed size, of one call"
    if kinds := LENGTH_DEPENDENT & set(_list_rope_types(model.config.to_dict())):
        return f"its {min(kinds)} rotary embedding depends on the longest sequence"
    if (mode := config.get_generation_mode()) not in MODES:
        return f"its generation config asks for {mode.value}"
    return _find_cache_obstacle(model)


def _find_cache_obstacle(model: PreTrainedModel) -> str:
    if not model._supports_default_dynamic_cache():
        return "its cache is its own"
    layer = find_unjoinable(make_rows(model, [1]).cache.layers)
    return f"its cache has a {layer}" if layer else ""


def _common(name: str) -> Callable[..., Any]:
    common: Callable[..., Any] = getattr(GenerationMixin, name)
    return common


def _list_rope_types(value: Any) -> Iterator[str]:
    """Every `rope_type` in a config, however deep."""
    if isinstance(value, dict):
        if isinstance(kind := value.get("rope_type"), str):
            yield kind
        for inner in value.values():
            yield from _list_rope_types(inner)


def _try_joining(model: PreTrainedModel, device: torch.device) -> str:
    """Generate two prompts alone, then so that one joins the other: the logits must be equal."""
    prompts = _make_prompts(model)
    alone = [_generate_alone(model, prompt, device) for prompt in prompts]
    logits_in_batch = _generate_joined(model, prompts, [ids for ids, _ in alone], device)
    for (_, expected), logits in zip(alone, logits_in_batch, strict=True):
        difference = compare_logits(expected, logits)
        if not difference <= TOLERANCES.get(model.dtype, 0.5):
            return f"a sequence that joined had other logits, by {difference:.2g} deviations"
    return ""


def may_pad_prompts(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether prompts of different lengths may run together, the shorter ones padded.

    Not before a recurrent state, which padding would change; and not if the logits then differ, as
    where a softmax of float32 finds float64 numbers masked by the least of them. Every rank must
    call it: it runs the model.
    """
    if has_recurrent_state(make_rows(model, [1]).cache.layers):
        return False
    prompts = _make_prompts(model)
    try:
        with run_inference(model.dtype):
            alone = [RunningBatch(model, device).prefill([0], [prompt])[0] for prompt in prompts]
            together = RunningBatch(model, device).prefill([0, 1], prompts)
    except RanksError:
        raise
    except MODEL_ERRORS:
        return False
    differences = [compare_logits(*pair) for pair in zip(alone, together, strict=True)]
    return all(each <= TOLERANCES.get(model.dtype, 0.5) for each in differences)


def _make_prompts(model: PreTrainedModel) -> list[list[int]]:
    size = min(count_vocabulary(model) or 1, 97)
    return [[(3 + 5 * at + 7 * n) % size for at in range(n)] for n in PROBE_LENGTHS]


def compare_logits(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """The largest difference of logits, in units of their standard deviation; or NaN."""
    return float((expected - logits).abs().max() / expected.std().clamp(min=1e-6))


def _generate_alone(
    model: PreTrainedModel, prompt: list[int], device: torch.device
) -> tuple[list[int], torch.Tensor]:
    """What `generate` makes of a prompt: the new ids, and their logits `[S, V]`, float32."""
    options = {"do_sample": False, "max_new_tokens": PROBE_STEPS, "min_new_tokens": PROBE_STEPS}
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
    inputs["attention_mask"] = inputs["attention_mask"].long()
    generation = ModelRunner(model, device).generate(inputs, options, with_logits=True)
    assert generation.logits is not None
    return generation.ids[0, len(prompt) :].tolist(), generation.logits[0].float()


def _generate_joined(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    ids: Sequence[list[int]],
    device: torch.device,
) -> list[torch.Tensor]:
    """The logits of the same tokens, `[S, V]` each, if the second joins after the first's step."""
    batch = RunningBatch(model, device)
    first, second = [batch.prefill([0], prompts[:1])[0]], []
    first.append(batch.decode([ids[0][0]])[0])
    second.append(batch.prefill([1], prompts[1:])[0])
    for step in range(1, PROBE_STEPS - 1):
        logits = batch.decode([ids[0][step], ids[1][step - 1]])
        first.append(logits[0])
        second.append(logits[1])
    batch.drop([0])
    second.append(batch.decode([ids[1][PROBE_STEPS - 2]])[0])
    return [torch.stack(first), torch.stack(second)]


def count_vocabulary(model: PreTrainedModel) -> int | None:
    """How many tokens a model's embedding has, on whichever rank; None if it has none."""
    if model.main_input_name != "input_ids":
        return None
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # a model of several towers
        return None
    size = getattr(table, "rows", None) or getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None


def find_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have by the model's config; None if it does not say."""
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return size if isinstance(size, int) and size > 0 else None
