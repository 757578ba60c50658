"""One rank: handles the requests that a channel brings, until there are no more.

As a program it is a rank process that `rank_processes.RankProcesses` starts.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.batching.abilities import find_abilities
from shardkit.runtime.batching.batch_runner import BatchRunner, JoiningPrompt
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.engine.channel import Channel, SocketChannel
from shardkit.runtime.engine.messages import (
    INPUTS,
    PROMPT,
    Message,
    select_prefixed,
    send_message,
)
from shardkit.runtime.engine.prompts import load_tokenizer
from shardkit.runtime.engine.stop_flag import StopFlag
from shardkit.runtime.engine.values import pack_output, unpack_value
from shardkit.runtime.loader import load_with_warnings
from shardkit.runtime.model_runner import ModelRunner
from shardkit.runtime.usage import measure_usage
from shardkit.timeouts import Timeouts

PR_SET_PDEATHSIG = 1  # prctl(2)
PARENT_POLL = 0.5  # seconds between two checks that the controlling process is there


class Worker:
    """This rank's model, and the requests that it handles."""

    def __init__(
        self, channel: Channel, group: TensorParallelGroup, own_folder: Path | None = None
    ) -> None:
        self._own_folder = own_folder  # this host's, whatever path rank 0 names
        self.channel = channel
        self.group = group
        self._runner: ModelRunner | None = None
        self._batch: BatchRunner | None = None
        self._folder = Path()
        self._actions: dict[str, Callable[[Message], Message]] = {
            "load": self._load,
            "forward": self._forward,
            "generate": self._generate,
            "call": self._call,
            "prepare": self._prepare,
            "step": self._step,
            "trace": self._trace,
            "measure": self._measure,
        }

    def run(self) -> None:
        """Respond to every request until the channel has no more."""
        while (request := self.channel.receive()) is not None:
            self.channel.send(self.respond(request))

    def respond(self, request: Message) -> Message:
        """Handle one request; an error is a response, too."""
        self.group.counts.update(all_reduce=0, all_gather=0)
        try:
            return self._actions[request.header["action"]](request)
        except Exception as error:  # whatever a model raises, the controller waits for a response
            return error_response(error)

    def _load(self, request: Message) -> Message:
        self._runner = self._batch = None
        dtype, reduce_dtype = (
            getattr(torch, name) if (name := request.header[key]) else None
            for key in ("dtype", "reduce_dtype")
        )
        options = {name: request.header[name] for name in ("verify", "dequantize")}
        options["reduce_dtype"] = reduce_dtype
        self._folder = self._own_folder or Path(request.header["folder"])
        model, warning = load_with_warnings(self._folder, self.group, dtype, **options)
        self._runner = ModelRunner(model, self.group.device)
        return Message({"dtype": str(model.dtype).removeprefix("torch."), "warning": warning})

    def _forward(self, request: Message) -> Message:
        return self._response(self._loaded.forward(request.tensors, request.header["options"]))

    def _generate(self, request: Message) -> Message:
        header = request.header
        generation = self._loaded.generate(
            request.tensors,
            header["options"],
            seed=header["seed"],
            with_logits=header["with_logits"],
            **self._stream_options(header["stream"]),
        )
        return self._response(generation.tensors())

    def _call(self, request: Message) -> Message:
        header = request.header
        values = header["arguments"].items()
        arguments = {name: unpack_value(value, request.tensors) for name, value in values}
        if arguments.get("stop_strings") is not None:
            arguments["tokenizer"] = load_tokenizer(self._folder)
        options = self._stream_options(header["stream"])
        output = self._loaded.call(header["method"], arguments, header["seed"], **options)
        tensors: dict[str, torch.Tensor] = {}
        if self.group.tp_rank != 0:  # every rank has the same, and rank 0 alone sends it
            return Message({"output": None})
        return Message({"output": pack_output(output, tensors)}, tensors)

    def _stream_options(self, stream: bool) -> dict[str, Any]:
        """What sends each step's tokens, and stops a generate; on every rank, to fail alike."""
        if not stream:
            return {}
        is_sender = self.group.tp_rank == 0
        stopping = self.channel.make_stopping(self.group.tp_rank)
        return {
            "streamer": TokenStreamer(self.channel if is_sender else None), "stopping": stopping,
        }  # fmt: skip

    def _prepare(self, _request: Message) -> Message:
        abilities = find_abilities(self._loaded)
        if not abilities.obstacle:
            is_sampler = self.group.tp_rank == 0
            self._batch = BatchRunner(self._loaded.model, self.group.device, is_sampler)
        return Message({"abilities": asdict(abilities)})

    def _step(self, request: Message) -> Message:
        if self._batch is None:
            raise RanksError("no running batch is prepared")
        header = request.header
        prompts = [JoiningPrompt(**prompt) for prompt in header["join"]]
        result = self._batch.run_step(dict(header["tokens"]), prompts)
        choices = {str(n): [c.token, c.logprob, c.top] for n, c in result.choices.items()}
        return Message({"choices": choices, "failed": result.failed, "refused": result.refused})

    def _trace(self, request: Message) -> Message:
        return Message({}, self._loaded.trace(request.tensors, request.header["modules"]))

    def _measure(self, request: Message) -> Message:
        prompt = select_prefixed(request.tensors, PROMPT)
        inputs = select_prefixed(request.tensors, INPUTS)
        usage = measure_usage(self._loaded, self.group.counts, inputs, prompt)
        return Message({"usage": usage.to_json()})

    @property
    def _loaded(self) -> ModelRunner:
        """The model. Raises RanksError before one is loaded."""
        if self._runner is None:
            raise RanksError("no model is loaded")
        return self._runner

    def _response(self, tensors: Mapping[str, torch.Tensor]) -> Message:
        """A response whose tensors rank 0 alone sends, since every rank has the same."""
        return Message({"counts": self.group.counts}, tensors if self.group.tp_rank == 0 else {})


class TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Sends the token ids of each step as transformers makes them."""

    def __init__(self, channel: Channel | None) -> None:
        self._channel = channel  # None for a rank that sends nothing
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Send one step's ids `[B]`; the first call has the prompt's, which are not sent."""
        if not self._is_prompt and self._channel is not None:
            self._channel.send(Message({"tokens": value.flatten().tolist()}))
        self._is_prompt = False

    def end(self) -> None:
        """Nothing: the response itself ends the stream."""


def error_response(error: Exception) -> Message:
    """An error as a response, in one line."""
    text = str(error) or type(error).__name__
    kind = "" if isinstance(error, RanksError) else f"{type(error).__name__}: "
    return Message({"error": kind + text.split("\n")[0], "lost": isinstance(error, RanksLost)})


def exit_with_parent(parent: int, from_main_thread: bool) -> None:
    """End this process when the controlling process ends, whatever either is doing then.

    The kernel's signal reaches even a rank that is stopped. But it is sent when the thread that
    started the rank ends, so it is asked for only if that is the main thread.
    """
    if from_main_thread:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL)
        os._exit(1)

    threading.Thread(target=watch, name="shardkit-parent", daemon=True).start()


def apply_environment(environment: Mapping[str, str]) -> None:
    """Use this rank's variables, and none that torchrun gave the controlling process."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ.pop("WORLD_SIZE", None)
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def main(arguments: list[str]) -> int:
    """Join the other ranks, report that, and handle requests. Returns the exit code."""
    start = json.loads(arguments[0])
    exit_with_parent(start["parent"], start["from_main_thread"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controlling process decides
    apply_environment(start["environment"])
    sock = socket.socket(fileno=start["socket"])
    try:
        group = connect(start["device"], Timeouts(**start["timeouts"]))
    except RanksError as error:
        send_message(sock, error_response(error))
        return error.exit_code
    send_message(sock, Message({"device": str(group.device)}))
    Worker(SocketChannel(sock, StopFlag(start["stop_flag"])), group).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
