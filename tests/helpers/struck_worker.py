"""A rank that sends itself a signal at load, in a prefill or in decoding, as a file says.

As a program it is a rank process of `StruckRanks`. The file is named by the environment, and is
JSON: the `signal`, and the `rank` and the `phase` that it is for. It is renamed as it is obeyed.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardkit.runtime.engine import worker
from shardkit.runtime.engine.rank_processes import RankProcesses

STRIKE = "SHARDKIT_STRIKE"  # in the environment: the file
WAITING = ".later"  # the suffix of a file that is for an engine once it runs
LONG = 8  # more tokens than the forward pass has that every engine begins with


class StruckRanks(RankProcesses):
    """Rank processes that a file has signal themselves."""

    worker = "tests.helpers.struck_worker"


def ask_for_strike(path: Path, signal: int, rank: int, phase: str, running: bool = True) -> None:
    """Have a rank send itself a signal when it next reaches a phase.

    If the engine is not `running`, it tries its model as it starts: `release_strike` then comes
    first, lest a rank is struck in such a try.
    """
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"signal": signal, "rank": rank, "phase": phase}))
    part.rename(path if running else path.with_suffix(WAITING))


def release_strike() -> None:
    """Let ranks obey a file that has waited for this; if there is one."""
    path = Path(os.environ[STRIKE])
    with suppress(FileNotFoundError):
        path.with_suffix(WAITING).rename(path)


def read_strike(path: Path) -> float:
    """When the strike was, on the clock that all processes share."""
    return float(path.with_suffix(".done").read_text())


def reach(rank: int, phase: str) -> None:
    """Obey the file, if it is for this rank and phase."""
    path = Path(os.environ[STRIKE])
    if not path.exists():
        return
    asked = json.loads(path.read_text())
    if (asked["rank"], asked["phase"]) != (rank, phase):
        return
    path.with_suffix(".done").write_text(f"{time.monotonic()}")
    path.unlink()
    os.kill(os.getpid(), asked["signal"])


def watch_phases() -> None:
    """Call `reach` before a shard is loaded, and between the layers of each forward pass."""
    names = vars(worker)  # whose functions look this one up as they run
    load = names["load_with_warnings"]

    def load_and_watch(folder: Path, group: Any, *others: Any, **options: Any) -> Any:
        reach(group.tp_rank, "load")
        model, warning = load(folder, group, *others, **options)

        def watch_pass(_layer: Any, _inputs: Any, output: Any) -> None:
            length = (output[0] if isinstance(output, tuple) else output).shape[1]
            if length == 1 or length > LONG:
                reach(group.tp_rank, "decode" if length == 1 else "prefill")

        model.model.layers[0].register_forward_hook(watch_pass)
        return model, warning

    names["load_with_warnings"] = load_and_watch


if __name__ == "__main__":
    watch_phases()
    sys.exit(worker.main(sys.argv[1:]))
