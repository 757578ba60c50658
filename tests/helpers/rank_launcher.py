"""Starts groups of ranks in which one is faulty, and says how each of the others ended."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.command_line import environment

MARK = "SHARDKIT_FAULT_TEST"  # in the environment of every process of a test


@dataclass(frozen=True)
class Ended:
    """A rank's exit code, what it said, and the seconds from the fault to its end.

    Without those in which the interpreter then tears itself down: on a busy machine, many.
    """

    code: int
    said: str
    after: float


class Zygote:
    """Forks ranks from a process that has imported torch."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server", "tests.helpers.rank_programs"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"),
        )  # fmt: skip
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.ended: dict[int, dict[str, Any]] = {}
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        assert "ready" in self.said.get(timeout=120)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said.put(json.loads(line))

    def fork(self, call: str, arguments: object, extra: Mapping[str, str], log: Path) -> int:
        """Start a rank; its pid."""
        asked = {"call": call, "arguments": arguments, "environment": extra, "log": str(log)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        while True:
            told = self.said.get(timeout=60)
            if "pid" in told:
                return int(told["pid"])
            self.ended[told["ended"]] = told

    def wait(self, pids: list[int], seconds: float) -> None:
        """Wait until these have ended, at most so long."""
        end = time.monotonic() + seconds
        while not set(pids) <= self.ended.keys() and time.monotonic() < end:
            try:
                told = self.said.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                return
            self.ended[told["ended"]] = told

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.listener.join(30)


def run_ranks(
    zygote: Zygote,
    tmp_path: Path,
    ranks: list[dict[str, Any]],
    faulty: int,
    keeper: str = "agent",
    limit: float = 60.0,
) -> dict[int, Ended]:
    """Run a group of which the ranks' arguments and environments are given, by position.

    Returns how all but the `faulty` one ended.  The store is kept here, or by rank 0.
    """
    stamps, scratch = tmp_path / "stamps", tmp_path / "scratch"
    stamps.mkdir()
    scratch.mkdir()
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TMPDIR": str(scratch),
        MARK: str(tmp_path), "WORLD_SIZE": str(len(ranks)),
        "TORCHELASTIC_USE_AGENT_STORE": str(keeper == "agent"),
    }  # fmt: skip
    if keeper != "agent":
        shared["MASTER_PORT"] = str(free_port())
    zygote.ended = {}
    pids = {}
    for at, rank in enumerate(ranks):
        if rank.get("never"):
            continue
        extra = {**shared, "RANK": str(at), **rank.get("environment", {})}
        arguments = {"stamps": str(stamps), **rank["arguments"]}
        pids[at] = zygote.fork("program", arguments, extra, tmp_path / f"log-{at}")
    survivors = [pid for at, pid in pids.items() if at != faulty]
    try:
        zygote.wait(survivors, limit)
    finally:
        for pid in set(pids.values()) - zygote.ended.keys():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        late = set(survivors) - zygote.ended.keys()
        zygote.wait(list(pids.values()), 10)
    assert not late, f"still running after {limit} s: {said(tmp_path)}"
    check_nothing_left(tmp_path, list(pids.values()))
    return read_ends(zygote, tmp_path, {at: pid for at, pid in pids.items() if at != faulty})


def read_ends(zygote: Zygote, tmp_path: Path, pids: dict[int, int]) -> dict[int, Ended]:
    """How ranks ended, and how long after the last that any rank stamped but its own end."""
    marks = {path.name: float(path.read_text()) for path in (tmp_path / "stamps").iterdir()}
    since = max(at for name, at in marks.items() if not name.startswith("ended"))
    ends = {int(name.split("-")[-1]): at for name, at in marks.items() if name.startswith("ended")}
    return {
        at: Ended(
            zygote.ended[pid]["code"],
            (tmp_path / f"log-{at}").read_text(),
            ends.get(pid, zygote.ended[pid]["at"]) - since,
        )
        for at, pid in pids.items()
    }


def said(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text()[-2000:] for path in sorted(tmp_path.glob("log-*"))}


def check_nothing_left(tmp_path: Path, pids: list[int]) -> None:
    """No process of the test, no shared memory of its ranks, no file where they may put some."""
    assert not list(marked(tmp_path))
    assert not list((tmp_path / "scratch").iterdir())
    owned = list_shared_memory()
    assert not [name for name in owned if any(str(pid) in name.split("_") for pid in pids)]


def list_shared_memory() -> set[str]:
    """The shared memory that has names: files. Folders beside them are those of other tests."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.is_file()}


def marked(tmp_path: Path) -> Iterator[int]:
    """The processes of a test that still run, however they were started."""
    mark = f"{MARK}={tmp_path}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
        except OSError:
            continue


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def divisible(folder: Path) -> Path:
    """Save a Llama that divides by 2, 3 and 4.  Returns `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=60, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
