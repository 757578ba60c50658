"""Compiled decoding: `generate` over a cache of fixed size, its steps compiled by torch.

transformers compiles the steps of a `generate` over a static cache, on a CPU only if it is asked
to. Here it is asked to, and told which size to give the cache, so that few are compiled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.generation.utils import GenerationMixin

from shardkit.errors import RanksLost, UsageError, first_line
from shardkit.runtime.batching.support import TOLERANCES, compare_logits, find_positions
from shardkit.runtime.distributed.collective_ops import GRAPH_TAGS
from shardkit.runtime.distributed.group import TensorParallelGroup

MIN_LENGTH = 128  # tokens of the smallest cache; larger ones have a power of two
STEPS = 5  # that a rehearsal generates: enough for CUDA graphs, which are made at the second
KINDS = 64  # of steps that are compiled at most: by rows, length, and what a sliding window holds
INDUCTOR = "inductor"
OWN = ("generate", "_sample", "_prepare_cache_for_generation", "_prepare_static_cache")


def check_compilable(model: PreTrainedModel, stays_quantized: bool) -> None:
    """Raise UsageError for a model, weights or none, of which it is known that none is compiled.

    Args:
        model: The model.
        stays_quantized: Whether it has weights that are computed in the forward.
    """
    obstacle = describe_compile_obstacle(model)
    if stays_quantized:
        obstacle = 'weights that stay quantized cannot be; use dequantize="load"'
    if obstacle:
        raise UsageError(f"decoding cannot be compiled: {obstacle}")


def describe_compile_obstacle(model: PreTrainedModel) -> str:
    """Why a model's decoding is not compiled, by what it is, in a few words; "" if it may be."""
    if not model.can_generate():
        return "the model does not generate"
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    own = [name for name in OWN if getattr(type(model), name) is not getattr(GenerationMixin, name)]
    if own:
        return f"its class has its own {own[0]}"
    if not model._supports_default_dynamic_cache():
        return "its cache is its own"
    try:
        if not StaticCache(model.config, max_cache_len=MIN_LENGTH).is_compileable:
            return "its cache has no fixed size"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its cache has no fixed size ({first_line(error)})"
    if model.get_compiled_call(None) == model.__call__:
        return "transformers does not compile it"
    return ""


def compile_decoding(
    model: PreTrainedModel, group: TensorParallelGroup, backend: str = INDUCTOR
) -> None:
    """Have a model's `generate` decode by compiled steps, and compile them for one short sequence.

    For another number of sequences, or length of the cache, they are compiled once more when it
    first comes, and then for all. Each time all ranks first run alone, in the time that loading
    may take, so that a rank that is compiling is not taken for one that is lost; and compiled steps
    must give what the others give.

    Args:
        model: This rank's part, loaded. Its class must have no obstacle.
        group: The ranks.
        backend: torch.compile's.

    Raises:
        RanksError: On every rank alike: if torch cannot compile it here, or not rightly.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, KINDS)
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = _make_config(group, backend)
    prepare, positions = model._prepare_static_cache, find_positions(model)
    rehearsed: set[tuple[int, int, bool]] = set()

    def prepare_cache(*, batch_size: int, max_cache_len: int, **options: Any) -> Any:
        length = choose_cache_length(max_cache_len, positions)
        rehearse(batch_size, length)
        model._previous_max_cache_length = 0  # else no cache is smaller than the largest before
        return prepare(batch_size=batch_size, max_cache_len=length, **options)

    def rehearse(rows: int, length: int) -> None:
        kind = rows, length, torch.is_inference_mode_enabled()
        if kind not in rehearsed:
            rehearsed.add(kind)  # before: the rehearsal prepares a cache, too
            _rehearse(model, group, rows, length)

    model._prepare_static_cache = prepare_cache
    with torch.inference_mode():
        rehearse(1, choose_cache_length(1, positions))


def choose_cache_length(tokens: int, positions: int | None = None) -> int:
    """The length of a cache for so many tokens: a power of two, so that lengths are few.

    Or as many as a model has positions: some have a mask of just that size.
    """
    length = max(MIN_LENGTH, 1 << (tokens - 1).bit_length())
    return length if positions is None else max(tokens, min(length, positions))


def _make_config(group: TensorParallelGroup, backend: str) -> CompileConfig:
    """How to compile: rounding as without, and on a GPU in CUDA graphs."""
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if group.device.type == "cuda" and (group.tp_size == 1 or GRAPH_TAGS):
        options["triton.cudagraphs"] = True
    config = CompileConfig(backend=backend, options=options if backend == INDUCTOR else None)
    # What depends on values, as which experts run, would be compiled again and again, on one rank
    # while others wait: a step is one graph, or is refused.
    config.fullgraph = True
    config.mode = None  # torch takes either a mode or options
    config._compile_all_devices = True
    return config


def _rehearse(model: PreTrainedModel, group: TensorParallelGroup, rows: int, length: int) -> None:
    """Compile what so many sequences and such a cache need, and wait until every rank has.

    Raises the same RanksError on every rank if one cannot.
    """
    error = ""
    try:
        with exchange_nothing(group):
            difference = _compare_steps(model, rows, length)
        if model._last_compile_config != model.generation_config.compile_config:
            error = "transformers does not compile it"
        elif not difference <= TOLERANCES.get(model.dtype, 0.5):
            error = f"compiled steps have other logits, by {difference:.2g} deviations"
    except Exception as fault:  # whatever it is, the other ranks must hear of it
        error = first_line(fault)
    group.all_agree({}, f"decoding cannot be compiled: {error}" if error else "")


def _compare_steps(model: PreTrainedModel, rows: int, length: int) -> float:
    """The largest difference that compiling makes to logits, in standard deviations."""
    size = min(model.config.get_text_config(decoder=True).vocab_size, 97)
    prompt = torch.arange(2 * rows, device=model.device).view(rows, 2) % size
    plain, compiled = (
        GenerationMixin.generate(
            model, prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=1,
            num_return_sequences=1, max_new_tokens=STEPS, min_new_tokens=STEPS,
            return_dict_in_generate=True, output_logits=True, **options,
        )
        for options in ({"cache_implementation": "dynamic"}, {"max_cache_len": length})
    )  # fmt: skip
    difference = 0.0
    for step in range(STEPS):
        pair = plain.logits[step].nan_to_num(), compiled.logits[step].nan_to_num()
        difference = max(difference, compare_logits(*pair))
        if not torch.equal(plain.sequences[:, 2 + step], compiled.sequences[:, 2 + step]):
            break  # of two tokens as probable; what follows them is not comparable
    return difference


class LoneTransport:
    """Carries tensors of a rank that is alone for a moment: every other rank's are its own."""

    def sum_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` says."""
        return x

    def sum_rounded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `Transport` says."""
        return x.to(dtype).to(x.dtype)

    def gather_ranks(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """As `Transport` says; longer ones are padded, and shorter ones cut."""
        return torch.cat([F.pad(x, (0, size - x.shape[-1])) for size in sizes], -1)

    def copy_first(self, x: torch.Tensor) -> torch.Tensor:
        """As `Transport` says."""
        return x

    def close(self) -> None:
        """As `Transport` says."""


@contextmanager
def exchange_nothing(group: TensorParallelGroup) -> Iterator[None]:
    """In a `with`, collectives return at once, and are not counted. Raises RanksLost."""
    if group.failure:
        raise RanksLost(group.failure)
    kept = group.transport, group.num_collectives, dict(group.counts)
    group.transport = LoneTransport()
    try:
        yield
    finally:
        group.transport, group.num_collectives, counts = kept
        group.counts.update(counts)
        group.set_status("compiled")
