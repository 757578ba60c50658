"""Starts ranks on this host and controls them; any death, error or silence is reported."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from shardkit.errors import RanksLost
from shardkit.runtime.distributed.diagnosis import Fault, combine_faults, name_silent
from shardkit.runtime.distributed.liveness import HEARTBEAT, ROLL_CALL, LivenessMonitor
from shardkit.runtime.distributed.rank_environment import make_variables
from shardkit.runtime.engine.channel import OnTokens
from shardkit.runtime.engine.heartbeats import find_silent, read_heartbeats
from shardkit.runtime.engine.messages import Message, encode_message, receive_message
from shardkit.runtime.engine.rank_output import RankOutput
from shardkit.runtime.engine.stop_flag import StopFlag
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts

GRACE = 2.0  # seconds that the other ranks have to respond once one has failed

Responses = dict[int, Message | Fault]


class RankProcesses:
    """Rank processes on this host; close them, or use them in a `with`.

    Args:
        size: How many to start.
        device: "cpu" or "cuda"; None means the GPUs, if there are any.
        timeouts: How long to wait for them.

    Raises:
        RanksError: A rank does not start or join; the message names it.
    """

    worker = "shardkit.runtime.engine.worker"  # the module that each rank runs

    def __init__(
        self, size: int, device: str | None = None, timeouts: Timeouts = DEFAULT_TIMEOUTS
    ) -> None:
        self.size = size
        self.timeouts = timeouts
        self._turn = threading.RLock()  # requests of several threads go one after another
        patience = timedelta(seconds=timeouts.join)
        self._store: dist.TCPStore | None = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience
        )
        self._stop_flag = StopFlag.create()
        self._outputs: list[RankOutput] = []
        self._socks: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                self._start(rank, device)
            responses: Responses = {}
            # Python's libraries are loaded first; only then do ranks miss one that does not join.
            self._collect(timeouts.load + timeouts.join, responses)
            if faults := select_faults(responses):
                raise combine_faults(faults, size)
        except BaseException:
            self.kill()
            self.close()
            raise

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process id of each rank; none once they have stopped."""
        return [process.pid for process in self._processes]

    def request(self, request: Message, on_tokens: OnTokens | None = None) -> list[Message]:
        """Have every rank handle a request.

        Args:
            request: What to do.
            on_tokens: Receives the token ids of each step of a streamed generate. Once it returns
                False, every rank stops after the same step, one or two steps later.

        Returns:
            The responses, by rank.

        Raises:
            RanksError: A rank failed, died or did not respond; the message names it. Unless every
                rank responded, all of them are stopped.
        """
        parts = encode_message(request)
        limit = self.timeouts.load if request.header["action"] == "load" else self.timeouts.request
        with self._turn:
            if not self._processes:
                raise RanksLost("the ranks have stopped; launch them again")
            self._stop_flag.clear()
            responses: Responses = {}
            try:
                self._send(parts, responses)
                self._collect(limit, responses, on_tokens)
            finally:
                faults = select_faults(responses)
                if len(responses) < self.size or any(fault.lost for fault in faults.values()):
                    self.kill()  # the next responses would not be to the next request
                    self.close()
        if faults:
            raise combine_faults(faults, self.size)
        return [r for _, r in sorted(responses.items()) if isinstance(r, Message)]

    def pause(self) -> None:
        """Nothing: a rank waits for its next request as long as this process lives."""

    def check(self) -> None:
        """Raise RanksLost if a rank has ended, though nothing was asked of it."""
        with self._turn:
            for rank, process in enumerate(self._processes):
                if process.poll() is not None:
                    raise RanksLost(self._explain_death(rank).reason)

    def describe_silence(self) -> str:
        """Which ranks give no heartbeat for a moment, in words; "" if all do, or none ever has."""
        if (store := self._store) is None:
            return ""
        silent = find_silent(store, range(self.size), 3 * HEARTBEAT)
        return name_silent(silent) if silent else ""

    def kill(self) -> None:
        """End every rank at once, even while another thread waits for a response."""
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
        for output in self._outputs:
            output.close(GRACE)
        self._stop_flag.close()
        self._socks, self._processes, self._outputs = [], [], []
        self._store = None  # its server ends with it, whoever still has this object

    def _start(self, rank: int, device: str | None) -> None:
        sock, rank_sock = socket.socketpair()
        sock.settimeout(self.timeouts.collective)  # a rank may stop in the middle of a message
        output = RankOutput(rank)
        self._outputs.append(output)
        self._socks.append(sock)
        with rank_sock, output as fd:
            start = self._start_arguments(rank, rank_sock.fileno(), device)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", self.worker, json.dumps(start)],
                    pass_fds=[rank_sock.fileno(), self._stop_flag.fd], env=self._environment(),
                    stdin=subprocess.DEVNULL, stdout=fd, stderr=fd,
                    process_group=0,  # Ctrl-C goes to the controlling process alone
                )
            )  # fmt: skip

    def _start_arguments(self, rank: int, fd: int, device: str | None) -> dict[str, object]:
        """What a rank needs to start, as `worker.main` reads it."""
        assert self._store is not None
        return {
            "socket": fd,
            "stop_flag": self._stop_flag.fd,
            "device": device,
            "timeouts": asdict(self.timeouts),
            "parent": os.getpid(),
            "from_main_thread": threading.current_thread() is threading.main_thread(),
            "environment": make_variables(rank, self.size, self._store.port),
        }

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.size)
        path = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
        defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(path)}

    def _send(self, parts: Iterable[bytes], responses: Responses) -> None:
        for rank, sock in enumerate(self._socks):
            try:
                for part in parts:
                    sock.sendall(part)
            except OSError:
                responses[rank] = self._explain_death(rank)

    def _collect(
        self, limit: float, responses: Responses, on_tokens: OnTokens | None = None
    ) -> None:
        """Add every rank's response or fault; `limit` is the seconds for one, or since a token.

        Once one rank fails, the others have a moment to report why, too. Once one has responded,
        those that the others need not wait for are watched here.
        """
        deadline = time.monotonic() + limit
        monitor = LivenessMonitor(self.timeouts.collective)
        with selectors.DefaultSelector() as selector:
            for rank in self._list_missing(responses):
                selector.register(self._socks[rank], selectors.EVENT_READ, rank)
            while selector.get_map():
                if select_faults(responses):
                    deadline = min(deadline, time.monotonic() + GRACE)
                seconds = max(0.0, deadline - time.monotonic())
                ready = selector.select(min(seconds, HEARTBEAT) if responses else seconds)
                if not ready and time.monotonic() >= deadline:
                    break
                if not ready:
                    self._add_overdue(monitor, responses)
                for rank in [key.data for key, _ in ready]:
                    response = self._receive(rank)
                    if not isinstance(response, list):
                        selector.unregister(self._socks[rank])
                        responses[rank] = response
                        continue
                    deadline = time.monotonic() + limit
                    if on_tokens and not on_tokens(response):
                        self._stop_flag.request()
        if not select_faults(responses):
            responses |= self._explain_silence(self._list_missing(responses), limit)

    def _receive(self, rank: int) -> Message | Fault | list[int]:
        """What a rank has sent: its response, why it has none, or the token ids of a step."""
        try:
            message = receive_message(self._socks[rank])
        except (OSError, ValueError):
            message = None
        if message is None:
            return self._explain_death(rank)
        if "tokens" in message.header:
            return list(message.header["tokens"])
        if "error" in message.header:
            return Fault(message.header["error"], message.header["lost"])
        return message

    def _list_missing(self, responses: Responses) -> list[int]:
        return [rank for rank in range(self.size) if rank not in responses]

    def _add_overdue(self, monitor: LivenessMonitor, responses: Responses) -> None:
        """Add faults of ranks that have not responded, nor given a heartbeat for too long."""
        if self._store is not None:
            heartbeats = read_heartbeats(self._store, self._list_missing(responses))
            for rank in monitor.overdue(heartbeats):
                responses[rank] = Fault(f"{name_silent([rank])} for {monitor.limit:g} s")

    def _explain_silence(self, ranks: list[int], limit: float) -> dict[int, Fault]:
        """Faults of ranks that do not respond in time: of those without a heartbeat, if any."""
        if not ranks or self._store is None:
            return {}
        stopped = find_silent(self._store, ranks, ROLL_CALL)
        states = {r: f"rank {r} is running, but" for r in ranks}
        if stopped:
            states = {r: f"{name_silent([r])}, and" for r in stopped}
        return {r: Fault(f"{text} did not answer within {limit:g} s") for r, text in states.items()}

    def _explain_death(self, rank: int) -> Fault:
        """Why a rank closed its connection."""
        try:
            code = self._processes[rank].wait(GRACE)
        except subprocess.TimeoutExpired:
            return Fault(f"rank {rank} does not answer any more")
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        # Who is killed says nothing of it: its last line is about something else.
        line = "" if code == -signal.SIGKILL else self._outputs[rank].read_last_line(GRACE)
        return Fault(f"rank {rank} {end}" + (f": {line}" if line else ""), ended=True)


def select_faults(responses: Responses) -> dict[int, Fault]:
    """The ranks that gave no result, and why."""
    return {rank: fault for rank, fault in responses.items() if isinstance(fault, Fault)}
