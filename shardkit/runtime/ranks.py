"""Starts ranks on this host and drives them: a death, an error or a silence is always reported."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

import torch
import torch.distributed as dist

from shardkit.errors import RanksError
from shardkit.runtime.group import COLLECTIVE_TIMEOUT, JOIN_TIMEOUT
from shardkit.runtime.wire import Message, receive, send

GRACE = 3.0  # seconds the other ranks have to answer once one has failed
REQUEST_TIMEOUT = 600.0


class Ranks:
    """`size` rank processes on this host; to be closed, or used in a `with`."""

    def __init__(
        self,
        size: int,
        device: str | None = None,
        timeout: float = COLLECTIVE_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
    ) -> None:
        """Start them and wait until all have joined.  Timeouts in seconds.  Raises RanksError."""
        self.size = size
        self.request_timeout = request_timeout
        self._turn = threading.Lock()  # requests of several threads go one after another
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_TIMEOUT),
        )  # fmt: skip
        self._logs: list[IO[bytes]] = []
        self._socks: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                self._start(rank, device, timeout)
            self._collect(time.monotonic() + 2 * JOIN_TIMEOUT, None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process id of each rank; none once they have stopped."""
        return [process.pid for process in self._processes]

    def ask(
        self,
        do: str,
        tensors: Mapping[str, torch.Tensor] | None = None,
        on_token: Callable[[list[int]], None] | None = None,
        **header: object,
    ) -> list[Message]:
        """Have every rank do something; their answers by rank.

        Raises RanksError, naming the rank and the cause, for an error, a death or a silence; unless
        every rank answered, all of them are then stopped.
        """
        message = Message({"do": do, **header}, tensors or {})
        with self._turn:
            if not self._processes:
                raise RanksError("the ranks have stopped; launch them again")
            for rank, sock in enumerate(self._socks):
                try:
                    send(sock, message)
                except OSError:
                    self._fail(self._death(rank))
            return self._collect(time.monotonic() + self.request_timeout, on_token)

    def close(self) -> None:
        """Stop every rank, by force if need be."""
        for sock in self._socks:
            sock.close()
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()
        self._socks, self._processes, self._logs = [], [], []

    def _start(self, rank: int, device: str | None, timeout: float) -> None:
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the ranks)
        self._logs.append(log)
        self._socks.append(ours)
        root = str(Path(__file__).parents[2])
        threads = max(1, (os.cpu_count() or 1) // self.size)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(
            [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        place = (theirs.fileno(), self._store.port, rank, self.size, timeout)
        arguments = [*map(str, place), device or ""]
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "shardkit.runtime.worker", *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    process_group=0,  # a Ctrl-C goes to the controlling process alone
                )
            )

    def _collect(
        self, deadline: float, on_token: Callable[[list[int]], None] | None
    ) -> list[Message]:
        """Every rank's answer.  Once one fails, the others have a moment to say why, too."""
        answers: dict[int, Message] = {}
        faults: dict[int, str] = {}
        with selectors.DefaultSelector() as selector:
            for rank, sock in enumerate(self._socks):
                selector.register(sock, selectors.EVENT_READ, rank)
            while len(answers) + len(faults) < self.size:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for key, _ in ready:
                    rank = key.data
                    message = _try_receive(self._socks[rank])
                    if message is not None and "token" in message.header and on_token:
                        on_token(message.header["token"])
                        continue
                    selector.unregister(self._socks[rank])
                    if message is not None and "error" not in message.header:
                        answers[rank] = message
                        continue
                    faults[rank] = message.header["error"] if message else self._death(rank)
                    deadline = min(deadline, time.monotonic() + GRACE)
        return self._judged(answers, faults)

    def _judged(self, answers: dict[int, Message], faults: dict[int, str]) -> list[Message]:
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        silent = [r for r in range(self.size) if r not in answers and r not in faults]
        if not faults:
            names = ", ".join(map(str, silent))
            self._fail(f"rank {names} did not answer within {self.request_timeout:.0f} s")
        cause = min(faults, key=lambda rank: (_follows(faults[rank]), rank))
        told = faults[cause]
        if len(set(faults.values())) > 1 and not told.startswith("rank "):
            told = f"rank {cause}: {told}"
        if len(faults) < self.size or any(p.poll() is not None for p in self._processes):
            self._fail(told)
        raise RanksError(told)

    def _fail(self, told: str) -> NoReturn:
        self.close()
        raise RanksError(told)

    def _death(self, rank: int) -> str:
        """What became of a rank that closed its connection."""
        process = self._processes[rank]
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return f"rank {rank} closed its connection"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        self._logs[rank].seek(0)
        lines = self._logs[rank].read()[-4096:].decode(errors="replace").strip().splitlines()
        return f"rank {rank} {how}" + (f": {lines[-1]}" if lines else "")


def _try_receive(sock: socket.socket) -> Message | None:
    try:
        return receive(sock)
    except OSError:
        return None


def _follows(text: str) -> bool:
    """Whether a fault only follows from another rank's: its connection was closed."""
    return "Connection" in text or "closed by peer" in text
