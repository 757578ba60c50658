"""Measures a model in the process of one rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.errors import UsageError
from shardkit.runtime.benchmark.contenders import Contender, Workload
from shardkit.runtime.benchmark.timed_transport import TimedTransport
from shardkit.runtime.compile_decoding import check_compilable, compile_decoding
from shardkit.runtime.config import read_source_config
from shardkit.runtime.distributed.connect import connect, pick_device
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.loader import load
from shardkit.runtime.rank_shard import resolve_model_class

IO_COUNTS, MEMORY_STATUS = Path("/proc/self/io"), Path("/proc/self/status")


def measure_rank(contender: Contender, workload: Workload) -> dict[str, Any]:
    """Load a model and run the workload.

    Returns:
        `load_seconds`; `read_bytes` by system calls and `memory_bytes` that the process grew by
        while it loaded, None where the system does not count them; and `runs`, for each batch
        size `batch`, `first_token_seconds`, `token_seconds` and `collective_seconds` for a token,
        None for a model that generates none, or for collectives that cannot be timed.
    """
    group = connect(workload.device or None) if contender.kind == "shards" else None
    before = _read_counts()
    started = time.perf_counter()
    model = _load_model(contender, workload, group)
    seconds = time.perf_counter() - started
    grown = {name: _subtract(count, before[name]) for name, count in _read_counts().items()}
    timer = TimedTransport.install(group) if group else None
    runs = [_run_batch(model, batch, workload, timer) for batch in workload.batches]
    return {"load_seconds": seconds, **grown, "runs": runs}


def _load_model(
    contender: Contender, workload: Workload, group: TensorParallelGroup | None
) -> PreTrainedModel:
    dtype, reduce_dtype = (
        getattr(torch, name) if name else None for name in (workload.dtype, workload.reduce_dtype)
    )
    if group is not None:
        return load(
            contender.folder,
            group=group,
            dtype=dtype,
            compile=contender.compiles,
            reduce_dtype=reduce_dtype,
        )
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if contender.kind == "transformers":
        options["tp_plan"] = "auto"
    config = read_source_config(contender.folder)
    model: PreTrainedModel = resolve_model_class(config).from_pretrained(
        contender.folder, config=config, use_safetensors=True, **options
    )
    if contender.kind == "unsharded":
        model.to(pick_device(workload.device or None))
        if contender.compiles:
            check_compilable(model, stays_quantized=False)
            compile_decoding(model.eval(), TensorParallelGroup(0, 1, model.device))
    return model.eval()


def _run_batch(
    model: PreTrainedModel, batch: int, workload: Workload, timer: TimedTransport | None
) -> dict[str, Any]:
    ids = _make_prompts(model, batch, workload)
    seconds: dict[str, Any] = {"batch": batch}
    with torch.inference_mode():
        if not model.can_generate():
            model(input_ids=ids)
            with _stopwatch(seconds, "first_token_seconds", model.device):
                model(input_ids=ids)
            return seconds | {"token_seconds": None, "collective_seconds": None}
        counts = (1, 1 + workload.new_tokens)
        for count in counts:
            _generate(model, ids, count)  # a first time, for what is made on first use
        if timer:
            timer.take_seconds()  # those of the first time
        with _stopwatch(seconds, "first_token_seconds", model.device):
            _generate(model, ids, 1)
        first_collectives = timer.take_seconds() if timer else None
        with _stopwatch(seconds, "all", model.device):
            _generate(model, ids, counts[-1])
        collectives = timer.take_seconds() if timer else None
    rest = seconds.pop("all") - seconds["first_token_seconds"]
    seconds["token_seconds"] = rest / workload.new_tokens
    both = _subtract(collectives, first_collectives)
    seconds["collective_seconds"] = None if both is None else max(0.0, both) / workload.new_tokens
    return seconds


def _generate(model: PreTrainedModel, ids: torch.Tensor, count: int) -> None:
    model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def _make_prompts(model: PreTrainedModel, batch: int, workload: Workload) -> torch.Tensor:
    """Token ids `[batch, prompt_tokens]`, no two rows alike. Raises UsageError."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    wanted = workload.prompt_tokens + workload.new_tokens + 1
    if isinstance(limit, int) and 0 < limit < wanted:
        raise UsageError(
            f"prompts and new tokens need {wanted} positions, and the model has {limit}; lower"
            " --prompt-tokens or --new-tokens"
        )
    ids = torch.arange(batch * workload.prompt_tokens).view(batch, -1)
    prompts: torch.Tensor = (ids % max(1, config.vocab_size - 8) + 4).to(model.device)
    return prompts


@contextmanager
def _stopwatch(seconds: dict[str, Any], name: str, device: torch.device) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - started


def _read_counts() -> dict[str, int | None]:
    """What Linux counts of this process: the bytes it has read, and its memory."""
    try:
        reads = IO_COUNTS.read_text().split("rchar: ")[1].split()[0]
        memory = MEMORY_STATUS.read_text().split("VmRSS:")[1].split()[0]
    except (OSError, IndexError):
        return {"read_bytes": None, "memory_bytes": None}
    return {"read_bytes": int(reads), "memory_bytes": int(memory) << 10}


def _subtract(after: Any, before: Any) -> Any:
    return None if after is None or before is None else after - before
