"""Run a shard folder under torch.distributed: transformers' own model, each rank with its shard.

from shardkit import runtime

model = runtime.load("llama-tp4")        # under torchrun: every rank has the full logits
logits = model(input_ids).logits

with runtime.launch("llama-tp4") as engine:     # or: start the ranks and drive them from here
    for text in engine.stream("Once upon a time", max_new_tokens=64):
        print(text, end="", flush=True)

Importing the package does not load torch: each name is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit.runtime.distributed.connect import connect
    from shardkit.runtime.distributed.group import TensorParallelGroup
    from shardkit.runtime.engine.engine import Engine
    from shardkit.runtime.engine.handle import (
        Chunk,
        Completion,
        Handle,
        RequestResult,
        TokenLogprob,
    )
    from shardkit.runtime.engine.launch_engine import drain_on_sigterm, launch
    from shardkit.runtime.engine.sampling_params import SamplingParams
    from shardkit.runtime.engine.scheduler import Limits
    from shardkit.runtime.engine.status import EngineStatus
    from shardkit.runtime.loader import load

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "EngineStatus",
    "Handle",
    "Limits",
    "RequestResult",
    "SamplingParams",
    "TensorParallelGroup",
    "TokenLogprob",
    "connect",
    "drain_on_sigterm",
    "launch",
    "load",
]

_HOMES = {
    "distributed.connect": ("connect",),
    "distributed.group": ("TensorParallelGroup",),
    "engine.engine": ("Engine",),
    "engine.handle": ("Chunk", "Completion", "Handle", "RequestResult", "TokenLogprob"),
    "engine.launch_engine": ("drain_on_sigterm", "launch"),
    "engine.sampling_params": ("SamplingParams",),
    "engine.scheduler": ("Limits",),
    "engine.status": ("EngineStatus",),
    "loader": ("load",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
