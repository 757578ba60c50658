"""Run a shard folder under torch.distributed: transformers' own model, each rank with its shard.

from shardkit import runtime

model = runtime.load("llama-tp4")        # under torchrun: every rank has the full logits
logits = model(input_ids).logits

with runtime.launch("llama-tp4") as engine:     # or: start the ranks and drive them from here
    for text in engine.stream("Once upon a time", max_new_tokens=64):
        print(text, end="", flush=True)
"""

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
