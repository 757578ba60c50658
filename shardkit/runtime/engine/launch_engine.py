"""Makes an engine: of ranks that this process starts, or of those that torchrun has started."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.distributed.rank_environment import is_rank
from shardkit.runtime.engine.controller import EngineRanks, TorchrunRanks
from shardkit.runtime.engine.engine import Engine
from shardkit.runtime.engine.messages import load_request
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.runtime.engine.scheduler import Limits
from shardkit.runtime.load_options import LoadOptions
from shardkit.runtime.packing import Dequantize
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts


def launch(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    verify: bool = False,
    dequantize: Dequantize = "forward",
    mmap: bool = False,
    compile: bool = False,
    reduce_dtype: torch.dtype | None = None,
    limits: Limits | None = None,
) -> Engine:
    """Start the ranks of a shard folder on this host, one process each; use it in a `with`.

    The ranks end with this process, however it ends. Under torchrun its ranks are used: rank 0
    returns the engine; any other follows it, and ends by SystemExit(0) once it is closed.

    Args:
        folder: A shard folder; as many ranks are started as it was split for.
        device: "cpu" or "cuda"; None means the GPUs, if there are any.
        dtype: What to compute in; None means the checkpoint's own dtype.
        timeouts: How long to wait for the ranks.
        verify: Whether each rank checks the SHA-256 of its shard while loading it.
        dequantize: When quantized weights are computed: "forward" or "load", as `load` has it.
        mmap: Whether weights stay in the mapped files, as `load` has it.
        compile: Whether decoding is compiled, as `load` has it; then sequences do not join others.
        reduce_dtype: torch.bfloat16 to send sums of wider activations in it, as `load` has it.
        limits: What the engine takes on at once.

    Raises:
        ManifestError: The folder is not a finished split; no process is started.
        UsageError: An option is not what it can be, or does not go with another.
        RanksError: A rank cannot load its shard, died, or did not answer in time.

    Example:
        >>> with launch("llama-tp4") as engine:
        ...     for text in engine.stream("Once upon a time", max_new_tokens=64):
        ...         print(text, end="", flush=True)
    """
    path, options = Path(folder), (dtype, verify, dequantize, mmap, compile, reduce_dtype)
    load = load_request(path, LoadOptions(*options))
    return Engine(path, _choose_ranks(path, device, timeouts), load, limits)


def _choose_ranks(
    folder: Path, device: str | None, timeouts: Timeouts
) -> Callable[[], EngineRanks]:
    """What starts the ranks, or those that torchrun has started. Raises ManifestError."""
    tp_size = read_manifest(folder).tp_size
    if is_rank():
        return _join_torchrun(folder, device, timeouts).reuse
    return partial(RankProcesses, tp_size, device, timeouts)


def _join_torchrun(folder: Path, device: str | None, timeouts: Timeouts) -> TorchrunRanks:
    """The ranks, on rank 0; any other follows it, and then raises SystemExit."""
    ranks = TorchrunRanks(connect(device, timeouts), folder)
    if ranks.is_follower:
        with _ignore_sigterm():
            ranks.follow()
        raise SystemExit(0)
    return ranks


@contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Let rank 0 decide when to end: torchrun sends SIGTERM to every rank."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def drain_on_sigterm(engine: Engine) -> Iterator[None]:
    """In a `with` of the main thread, SIGTERM drains an engine, and then ends the program.

    At the first SIGTERM the engine takes no more requests; once the others have finished, or at a
    second SIGTERM, SystemExit(143) is raised in the main thread.
    """
    requested, lock, ended = threading.Event(), threading.Lock(), False

    def drain() -> None:
        engine.drain()
        with lock:
            if not ended:  # else the program goes on to its own end
                os.kill(os.getpid(), signal.SIGTERM)

    def handle(_number: int, _frame: object) -> None:
        if requested.is_set():
            raise SystemExit(128 + signal.SIGTERM)
        requested.set()
        threading.Thread(target=drain, name="shardkit-drain", daemon=True).start()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        with lock:
            ended = True
            signal.signal(signal.SIGTERM, before)
