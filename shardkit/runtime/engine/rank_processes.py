"""Starts ranks on this host and drives them: a death, an error or a silence is always reported."""

import json
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
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from shardkit.errors import RanksError
from shardkit.runtime.distributed.diagnosis import Fault, judged
from shardkit.runtime.distributed.group import DEFAULT
from shardkit.runtime.distributed.liveness import ROLL_CALL
from shardkit.runtime.distributed.rendezvous import beat_key
from shardkit.runtime.engine.messages import Message, receive, send
from shardkit.timeouts import Timeouts

GRACE = 2.0  # seconds the other ranks have to answer once one has failed

OnToken = Callable[[list[int]], None]


Faults = dict[int, Fault]
Outcome = dict[int, Message | Fault]


class Ranks:
    """`size` rank processes on this host; to be closed, or used in a `with`."""

    worker = "shardkit.runtime.engine.worker"  # the module each rank runs

    def __init__(self, size: int, device: str | None = None, timeouts: Timeouts = DEFAULT) -> None:
        """Start them and wait until all have joined.  Raises RanksError."""
        self.size = size
        self.timeouts = timeouts
        self._turn = threading.RLock()  # requests of several threads go one after another
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeouts.join),
        )  # fmt: skip
        self._logs: list[IO[bytes]] = []
        self._socks: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                self._start(rank, device)
            outcome: Outcome = {}
            # Loading Python's libraries is loading; then ranks miss one that does not join.
            self._collect(timeouts.load + timeouts.join, outcome)
            if faults := faults_of(outcome):
                raise judged(faults, size)
        except BaseException:
            self.kill()
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
        on_token: OnToken | None = None,
        **header: object,
    ) -> list[Message]:
        """Have every rank do something; their answers by rank.

        Raises RanksError, naming the rank and the cause, for an error, a death or a silence; unless
        every rank answered, all of them are then stopped.
        """
        message = Message({"do": do, **header}, tensors or {})
        limit = self.timeouts.load if do == "load" else self.timeouts.request
        with self._turn:
            if not self._processes:
                raise RanksError("the ranks have stopped; launch them again")
            outcome: Outcome = {}
            try:
                self._send(message, outcome)
                self._collect(limit, outcome, on_token)
            finally:
                if len(outcome) < self.size or any(f.lost for f in faults_of(outcome).values()):
                    self.kill()  # the next answers would not be the next question's
                    self.close()
        if faults := faults_of(outcome):
            raise judged(faults, self.size)
        return [found for _, found in sorted(outcome.items()) if isinstance(found, Message)]

    def kill(self) -> None:
        """End every rank at once, a request included that another thread is waiting for."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Stop every rank, by force if need be."""
        if not self._turn.acquire(blocking=False):
            self.kill()
            self._turn.acquire()
        try:
            self._close()
        finally:
            self._turn.release()

    def _close(self) -> None:
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

    def _start(self, rank: int, device: str | None) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(self.timeouts.collective)  # a rank may stop in the middle of a message
        log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the ranks)
        self._logs.append(log)
        self._socks.append(ours)
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", self.worker, self._place(rank, theirs.fileno(), device)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    process_group=0,  # a Ctrl-C goes to the controlling process alone
                )
            )

    def _place(self, rank: int, fd: int, device: str | None) -> str:
        """What a rank is told as it starts, as `worker.main` reads it."""
        environment: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank}
        if self.size > 1:
            port = self._store.port
            environment |= {
                "WORLD_SIZE": self.size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": True}  # it is kept here
        return json.dumps({
            "socket": fd, "device": device, "timeouts": asdict(self.timeouts),
            "parent": os.getpid(),
            "signalled": threading.current_thread() is threading.main_thread(),
            "environment": {name: str(value) for name, value in environment.items()},
        })  # fmt: skip

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.size)
        path = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
        return given | {"PYTHONPATH": os.pathsep.join(path)}

    def _send(self, message: Message, outcome: Outcome) -> None:
        for rank, sock in enumerate(self._socks):
            try:
                send(sock, message)
            except OSError:
                outcome[rank] = self._death(rank)

    def _collect(self, limit: float, outcome: Outcome, on_token: OnToken | None = None) -> None:
        """Add every rank's answer or fault, those within `limit` seconds or of the last token.

        Once one fails, the others have a moment to say why, too.
        """
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            for rank, sock in enumerate(self._socks):
                if rank not in outcome:
                    selector.register(sock, selectors.EVENT_READ, rank)
            while selector.get_map():
                if faults_of(outcome):
                    deadline = min(deadline, time.monotonic() + GRACE)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for rank in [key.data for key, _ in ready]:
                    found = self._take(rank)
                    if not isinstance(found, list):
                        selector.unregister(self._socks[rank])
                        outcome[rank] = found
                        continue
                    deadline = time.monotonic() + limit
                    if on_token:
                        on_token(found)
        if not faults_of(outcome):
            outcome |= self._silence([r for r in range(self.size) if r not in outcome], limit)

    def _take(self, rank: int) -> Message | Fault | list[int]:
        """What a rank has sent: its answer, why it has none, or the token ids of a step."""
        try:
            message = receive(self._socks[rank])
        except (OSError, ValueError):
            message = None
        if message is None:
            return self._death(rank)
        if "token" in message.header:
            return list(message.header["token"])
        if "error" in message.header:
            return Fault(message.header["error"], message.header["lost"])
        return message

    def _silence(self, ranks: list[int], limit: float) -> Faults:
        """Ranks that do not answer in time: those that give no sign of life, if there are such."""
        if not ranks:
            return {}
        before = self._beats(ranks)
        time.sleep(ROLL_CALL)
        now = self._beats(ranks)
        stopped = [rank for rank in ranks if now.get(rank) == before.get(rank) is not None]
        how = "died or is stopped: no sign of life, and" if stopped else "is running, but"
        return {
            rank: Fault(f"rank {rank} {how} did not answer within {limit:g} s")
            for rank in stopped or ranks
        }

    def _beats(self, ranks: list[int]) -> dict[int, bytes]:
        """The last sign of life of those ranks that have given one."""
        return {
            rank: self._store.get(key)
            for rank in ranks
            if self._store.check([key := beat_key(rank)])
        }

    def _death(self, rank: int) -> Fault:
        """What became of a rank that closed its connection."""
        process = self._processes[rank]
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return Fault(f"rank {rank} does not answer any more")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        self._logs[rank].seek(0)
        lines = self._logs[rank].read()[-4096:].decode(errors="replace").strip().splitlines()
        return Fault(f"rank {rank} {how}" + (f": {lines[-1]}" if lines else ""), ended=True)


def faults_of(outcome: Outcome) -> Faults:
    """Those ranks that gave no answer, and why."""
    return {rank: found for rank, found in outcome.items() if isinstance(found, Fault)}
