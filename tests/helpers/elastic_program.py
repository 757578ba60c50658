"""A server program under torchrun's own agent, whose ranks are forked from a process with torch.

The agent is what `torchrun` runs, and restarts the ranks once. A rank is struck as `struck_worker`
has it; each leaves what it heard, and when, in a folder.
"""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardkit import runtime
from shardkit.errors import RanksLost, ShardkitError
from shardkit.timeouts import Timeouts
from tests.helpers.struck_worker import release_strike, watch_phases

PROMPTS = [[1, 2], [3, 4, 5]]
IDLE = 4.0  # seconds, longer than the ranks wait for each other in a collective while in use


def run_agent(world: int, folder: str, out: str, phase: str, timeouts: dict[str, float]) -> int:
    """What `torchrun --max-restarts 1` does with as many ranks. Its exit code."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world, run_id="signals", rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=1, start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, run_rank)(folder, out, phase, timeouts)
    except ChildFailedError as error:
        print(error, flush=True)
        return 1
    return 0


def run_rank(folder: str, out: str, phase: str, timeouts: dict[str, float]) -> None:
    """One rank of the program, which ends as a process does that torchrun starts.

    multiprocessing's own would not leave the group as it exits, and waits for the agent, though
    that has asked it to end.
    """
    atexit._clear()  # what the agent would do at its end
    code = 0
    try:
        run_program(folder, out, phase, timeouts)
    except SystemExit as error:
        code = int(error.code or 0)
    atexit._run_exitfuncs()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(code)
    if code:
        sys.exit(code)


def run_program(folder: str, out: str, phase: str, timeouts: dict[str, float]) -> None:
    """What a server program does; what it heard goes to a file; an error ends it with a code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a program has it that torchrun starts
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    leave(Path(out), f"pid-{attempt}-{rank}", os.getpid())
    watch_phases()
    try:
        with (
            runtime.launch(folder, device="cpu", timeouts=Timeouts(**timeouts)) as engine,
            runtime.drain_on_sigterm(engine),
        ):
            first = attempt == "0" and phase != "load"
            try:
                said = ask(engine, Path(out), phase if first else "")
            except SystemExit:  # by torchrun's SIGTERM, once what ran has failed
                if failure := engine.status().failure:
                    words = {"error": failure, "at": time.monotonic()}
                    leave(Path(out), f"said-{attempt}-0", words)
                raise
            leave(Path(out), f"said-{attempt}-0", said)
    except ShardkitError as error:
        leave(Path(out), f"said-{attempt}-{rank}", {"error": str(error), "at": time.monotonic()})
        sys.exit(error.exit_code)


def ask(engine: runtime.Engine, out: Path, phase: str) -> object:
    """Tokens; or, if a rank is struck, its error."""
    release_strike()
    if phase == "idle":
        time.sleep(IDLE)
        leave(out, "idle", time.monotonic())
        end = time.monotonic() + 20
        while engine.alive and time.monotonic() < end:
            time.sleep(0.05)
    prompts = [[5] * 40, [6] * 30] if phase == "prefill" else PROMPTS
    size = 1500 if phase else 6
    handles = [engine.submit(ids, max_tokens=size, temperature=0) for ids in prompts]
    lost: list[str] = []
    for handle in handles:
        try:
            handle.result(60)
        except RanksLost as error:
            lost.append(str(error))
    if lost:
        assert len(set(lost)) == 1
        assert len(lost) == len(handles)
        raise RanksLost(lost[0])
    return [list(handle.result(60).ids) for handle in handles]


def leave(folder: Path, name: str, what: object) -> None:
    """Leave something for the test, whole."""
    part = folder / f"{name}.part"
    part.write_text(json.dumps(what))
    part.rename(folder / name)
