"""One rank, started by `ranks.Ranks`: does what the controlling process asks, until it is gone."""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.group import TensorParallelGroup, connect
from shardkit.runtime.engine.messages import Message, receive, send
from shardkit.runtime.loader import load_with_warnings
from shardkit.runtime.model_runner import fitted, tensors_of, uncached
from shardkit.runtime.trace import Trace
from shardkit.timeouts import Timeouts

PR_SET_PDEATHSIG = 1
LOOK = 0.5  # seconds between two looks at whether the controlling process is there


class Worker:
    """This rank's model, and what can be asked of it."""

    def __init__(self, sock: socket.socket, group: TensorParallelGroup) -> None:
        self.sock = sock
        self.group = group
        self.model: PreTrainedModel | None = None
        self.actions: dict[str, Callable[[Message], Message]] = {
            "load": self.load,
            "forward": self.forward,
            "generate": self.generate,
            "trace": self.trace,
        }

    def run(self) -> None:
        """Answer every message, an error included, until the other side closes."""
        while (message := receive(self.sock)) is not None:
            try:
                answer = self.actions[message.header["do"]](message)
            except Exception as error:
                answer = failure(error)
            send(self.sock, answer)

    def load(self, message: Message) -> Message:
        """Load this rank's shard of a folder."""
        self.model = None
        name = message.header["dtype"]
        dtype = getattr(torch, name) if name else None
        folder, verify = Path(message.header["folder"]), message.header.get("verify", False)
        self.model, slow = load_with_warnings(folder, self.group, dtype, verify)
        return Message({"dtype": str(self.model.dtype).removeprefix("torch."), "slow": slow})

    def forward(self, message: Message) -> Message:
        """The model's outputs; only rank 0 sends them, since every rank has the same."""
        with self.asked(message) as (model, inputs):
            found = tensors_of(model(**inputs, **self.options(message)))
        return self.answer({"counts": self.group.counts}, found)

    def generate(self, message: Message) -> Message:
        """Token ids; rank 0 sends each step's as it comes, if asked to."""
        with self.asked(message) as (model, inputs):
            options = dict(message.header["options"])
            if message.header["seed"] is not None:
                torch.manual_seed(message.header["seed"])
            if message.header["stream"] and self.group.tp_rank == 0:
                options["streamer"] = TokenStreamer(self.sock)
            if message.header["with_logits"]:
                options.update(output_logits=True, return_dict_in_generate=True)
                made = model.generate(**inputs, **options)
                found = {"ids": made.sequences, "logits": torch.stack(made.logits, 1)}
            else:
                found = {"ids": model.generate(**inputs, **options)}
        return self.answer({}, found)

    def trace(self, message: Message) -> Message:
        """The outputs of the modules named, as this rank has them."""
        with self.asked(message) as (model, inputs), Trace(model, message.header["modules"]) as t:
            model(**inputs, **self.options(message))
        return Message({"order": list(t.outputs)}, t.outputs)

    def options(self, message: Message) -> dict[str, Any]:
        """The options asked for; without any, those of a forward pass without a cache."""
        asked = message.header["options"]
        assert self.model is not None
        return uncached(self.model) if asked is None else dict(asked)

    def answer(self, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Message:
        """An answer with tensors from rank 0, and without from the others."""
        return Message(header, tensors if self.group.tp_rank == 0 else {})

    @contextmanager
    def asked(self, message: Message) -> Iterator[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
        """The model, counts at zero, and the inputs on its device, without gradients."""
        if self.model is None:
            raise RanksError("no model is loaded")
        self.group.counts.update(all_reduce=0, all_gather=0)
        with torch.inference_mode():
            yield self.model, fitted(message.tensors, self.model, self.group.device)


class TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Sends each step's token ids as transformers makes them; the prompt's come first."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """One step's ids; the first call has the prompt, which is not sent."""
        if not self.prompt:
            send(self.sock, Message({"token": value.flatten().tolist()}))
        self.prompt = False

    def end(self) -> None:
        """Nothing: the answer itself ends the stream."""


def failure(error: Exception) -> Message:
    """An error as an answer, in one line."""
    text = str(error) or type(error).__name__
    kind = "" if isinstance(error, RanksError) else f"{type(error).__name__}: "
    return Message({"error": kind + text.split("\n")[0], "lost": isinstance(error, RanksLost)})


def end_with(parent: int, signalled: bool) -> None:
    """End this process when the controlling process does, whatever either is doing then.

    The kernel's signal reaches even a rank that is stopped; but it comes when the thread that
    started the rank ends, so it is asked for only if that is the main thread (`signalled`).
    """
    if signalled:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, name="shardkit-parent", daemon=True).start()


def settle(environment: Mapping[str, str]) -> None:
    """Take the place given to this rank, and none that torchrun gave the controlling process."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ.pop("WORLD_SIZE", None)
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def main(arguments: list[str]) -> int:
    """Join the other ranks, say so, and work."""
    place = json.loads(arguments[0])
    end_with(place["parent"], place["signalled"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controlling process decides
    settle(place["environment"])
    sock = socket.socket(fileno=place["socket"])
    try:
        group = connect(place["device"], Timeouts(**place["timeouts"]))
    except RanksError as error:
        send(sock, failure(error))
        return error.exit_code
    send(sock, Message({"ready": str(group.device)}))
    Worker(sock, group).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
