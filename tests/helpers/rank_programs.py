"""What the ranks of the fault tests run: join, load, compute, and fail at a given point."""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import shardkit
from shardkit import runtime
from shardkit.errors import ShardkitError
from shardkit.runtime.distributed import group as group_module
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.timeouts import Timeouts
from tests.helpers.elastic_program import run_agent

__all__ = ["program", "run_agent"]  # what the fork server may be asked for
PRELOADED = runtime.load, runtime.launch  # before ranks are forked
torch.set_num_threads(1)


def spin() -> None:
    while True:
        pass


def boom() -> None:
    raise ValueError("boom")


FAULTS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raises": boom,
    "exits": lambda: sys.exit(0),
    "exits at once": lambda: os._exit(0),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(600),
    "loops": spin,
}


def stamp(folder: Path, what: str) -> None:
    """Leave when something happened, on the clock that all processes share."""
    (folder / f"{what}-{os.environ.get('RANK')}-{os.getpid()}").write_text(f"{time.monotonic()}")


def program(
    stamps: str, timeouts: dict[str, float], fault: str = "", phase: str = "", **options: str
) -> int:
    """One rank; with a `fault` it is the faulty one, at that `phase`.  Its exit code."""
    at = Path(stamps)

    def reach(here: str) -> None:
        if fault and here == phase:
            stamp(at, "fault")
            FAULTS[fault]()

    try:
        stamp(at, "start")
        atexit.register(stamp, at, "ended")  # the last thing but the interpreter's own ending
        pretend(options)
        reach("before joining")
        group = runtime.connect("cpu", Timeouts(**timeouts))
        reach("after joining")
        if "folder" in options:
            compute(group, reach, options)
        else:
            strikes = at if fault and phase == "in a collective" else None
            sum_on(group, reach, strikes, fault, options)
    except ShardkitError as error:
        print(f"Error: {error}", flush=True)
        return error.exit_code
    print("finished", flush=True)
    return 0


def pretend(options: dict[str, str]) -> None:
    """Be another version of what ranks must have alike."""
    packages: list[Any] = [torch, transformers, shardkit]
    for module in packages:
        if version := options.get(module.__name__):
            module.__version__ = version
            if module is shardkit:
                group_module.__version__ = version  # type: ignore[attr-defined]


def sum_on(
    group: TensorParallelGroup,
    reach: Callable[[str], None],
    at: Path | None,
    fault: str,
    options: dict[str, str],
) -> None:
    """Collectives until one fails; the faulty rank may fail in the middle of one."""
    group.all_reduce(torch.ones(4))
    reach("before a collective")
    if at is not None:

        def strike() -> None:
            stamp(at, "fault")
            FAULTS[fault]()

        timer = threading.Timer(float(options.get("delay", "0.3")), strike)
        timer.daemon = True
        timer.start()
    big = torch.ones(int(options.get("elements", 1 << 20)))
    for _ in range(int(options.get("sums", 1 << 30))):
        group.all_reduce(big)


def compute(
    group: TensorParallelGroup, reach: Callable[[str], None], options: dict[str, str]
) -> None:
    """A forward and a generate of a model."""
    dtype = getattr(torch, options["dtype"]) if "dtype" in options else None
    model = runtime.load(options["folder"], group=group, dtype=dtype, verify="verify" in options)
    reach("after loading")
    ids = torch.tensor(json.loads(options.get("ids", "[[1, 2, 3]]")))
    call = options.get("call", "forward")
    with torch.inference_mode():
        if call == "forward":
            model(ids)
        else:
            model.generate(ids, max_new_tokens=5, do_sample=False)
        reach("between two calls")
        model(ids)


if __name__ == "__main__":  # under torchrun: each rank's own arguments, by rank
    sys.exit(program(**json.loads(Path(sys.argv[1]).read_text())[int(os.environ["RANK"])]))
