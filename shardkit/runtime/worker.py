"""One rank, started by `ranks.Ranks`: does what the controlling process asks, until it is gone."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from shardkit.errors import RanksError
from shardkit.runtime.forward import fitted, tensors_of, uncached
from shardkit.runtime.group import JOIN_TIMEOUT, TensorParallelGroup, connect
from shardkit.runtime.load import load_told
from shardkit.runtime.trace import Trace
from shardkit.runtime.wire import Message, receive, send

PR_SET_PDEATHSIG = 1


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
                text = str(error) or type(error).__name__
                kind = "" if isinstance(error, RanksError) else f"{type(error).__name__}: "
                answer = Message({"error": kind + text.split("\n")[0]})
            send(self.sock, answer)

    def load(self, message: Message) -> Message:
        """Load this rank's shard of a folder."""
        self.model = None
        name = message.header["dtype"]
        dtype = getattr(torch, name) if name else None
        folder, verify = Path(message.header["folder"]), message.header.get("verify", False)
        self.model, slow = load_told(folder, self.group, dtype, verify)
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


def main(arguments: list[str]) -> None:
    """Join the other ranks, say so, and work."""
    fd, port, rank, size, timeout, device = arguments
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controlling process decides
    sock = socket.socket(fileno=int(fd))
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if int(size) > 1:
        store = dist.TCPStore(
            "127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=JOIN_TIMEOUT)
        )
        group = connect(device or None, float(timeout), store)
    else:
        os.environ.pop("WORLD_SIZE")
        group = connect(device or None)
    send(sock, Message({"ready": str(group.device)}))
    Worker(sock, group).run()


if __name__ == "__main__":
    main(sys.argv[1:])
