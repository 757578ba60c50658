"""Split Hugging Face checkpoints into tensor-parallel shards, verify them, and run them.

Every command of `shardkit` is a function here:

    import shardkit

    shardkit.plan("models/llama", tp_size=4).summary.loaded_bytes
    shardkit.split("models/llama", "llama-tp4", tp_size=4)
    report = shardkit.verify("llama-tp4", source="models/llama")
    with shardkit.launch("llama-tp4") as engine:
        for text in engine.stream("Once upon a time", max_new_tokens=64):
            print(text, end="", flush=True)

Importing the package loads neither torch nor click: each function is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit.convert import merge, reshard, split
    from shardkit.planning import plan
    from shardkit.runtime import launch, load
    from shardkit.verification import verify

__version__ = "0.1.0"
__all__ = ["__version__", "launch", "load", "merge", "plan", "reshard", "split", "verify"]

_HOMES = {
    "launch": "shardkit.runtime",
    "load": "shardkit.runtime",
    "merge": "shardkit.convert",
    "plan": "shardkit.planning",
    "reshard": "shardkit.convert",
    "split": "shardkit.convert",
    "verify": "shardkit.verification",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
