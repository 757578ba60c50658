"""The tensor-parallel group: how ranks join and agree, and their collectives.

Tensor parallelism needs two collectives in a forward pass: the sum of row-parallel outputs, and the
concatenation of column-parallel ones (Shoeybi et al. 2019, Megatron-LM).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from shardkit import __version__
from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.choose_transport import share_memory
from shardkit.runtime.distributed.collective_ops import (
    all_gather_op,
    all_reduce_op,
    register_group,
)
from shardkit.runtime.distributed.diagnosis import (
    REPORT_BYTES,
    encode_report,
    find_difference,
    first_sentence,
    list_errors,
)
from shardkit.runtime.distributed.host_network import INTERFACE, agree_on_network
from shardkit.runtime.distributed.liveness import Link
from shardkit.runtime.distributed.rendezvous import connect_store
from shardkit.runtime.distributed.rounded_sums import is_wider
from shardkit.runtime.distributed.torch_transport import TorchTransport, Transport

T = TypeVar("T")


@dataclass
class TensorParallelGroup:
    """This rank's place in a group of ranks, and the group's collectives.

    A failed collective ends the group: every later one raises RanksLost.

    Attributes:
        tp_rank: This rank, from 0.
        tp_size: The number of ranks.
        device: Where this rank computes.
        process_group: torch's process group; None for a single rank.
        link: What ranks tell each other outside collectives; None unless `connect` made the group.
            Through it ranks agree before any collective, and find out which rank is missing when
            one fails.
        transport: What carries tensors on CPUs of one host: memory that the ranks share; None for
            the process group.
        counts: How many all-reduces and all-gathers were made since it was last reset.
        num_collectives: How many collectives of any kind were made.
        failure: Why the group can no longer be used; "" if it can.
        number: What compiled models know it by.
    """

    tp_rank: int
    tp_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None
    link: Link | None = None
    transport: Transport | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"all_reduce": 0, "all_gather": 0})
    num_collectives: int = 0
    failure: str = ""
    number: int = field(init=False)

    def __post_init__(self) -> None:
        self.number = register_group(self)

    @property
    def exact(self) -> "TensorParallelGroup":
        """The group whose sums are sent as they are: this one."""
        return self

    def all_reduce(self, x: torch.Tensor, sent_as: torch.dtype | None = None) -> torch.Tensor:
        """Sum a tensor over the ranks.

        Args:
            x: This rank's summand, of any shape; it may be overwritten.
            sent_as: The dtype that a wider `x` is rounded to, to be sent in fewer bytes; it is
                still added in its own.

        Returns:
            The sum of every rank's `x`, on every rank.

        Raises:
            RanksError: A rank died, stalled or left; the message names it.
        """
        if torch.compiler.is_compiling():
            return all_reduce_op(x, self.number) if self.tp_size > 1 else x
        self.counts["all_reduce"] += 1
        if self.tp_size > 1:
            x, carry = x.contiguous(), self.carrier
            if sent_as is not None and is_wider(x.dtype, sent_as):
                return self._run("all_reduce", lambda: carry.sum_rounded(x, sent_as))
            return self._run("all_reduce", lambda: carry.sum_ranks(x))
        return x

    def add_once(self, y: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """A sum over the ranks with a term that each rank has added to it: `y + term`."""
        return y + term

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenate the ranks' tensors along the last dimension.

        Args:
            x: This rank's part, `[..., sizes[tp_rank]]`.
            sizes: The length of every rank's last dimension.

        Returns:
            `[..., sum(sizes)]`, on every rank.

        Raises:
            RanksError: A rank died, stalled or left; the message names it.
        """
        if torch.compiler.is_compiling():
            return all_gather_op(x, list(sizes), self.number) if self.tp_size > 1 else x
        self.counts["all_gather"] += 1
        if self.tp_size == 1:
            return x
        return self._concatenate(x.contiguous(), sizes)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, on every rank, which passes a tensor of the same shape and dtype.

        Raises:
            RanksError: A rank died, stalled or left; the message names it.
        """
        if self.tp_size > 1:
            x, carry = x.to(self.device).contiguous(), self.carrier
            return self._run("broadcast", lambda: carry.copy_first(x))
        return x

    def all_agree(
        self, report: Mapping[str, str], error: str = "", note: str = "", by_store: bool = True
    ) -> tuple[str, ...]:
        """Raise the same RanksError on every rank unless all report the same and none an error.

        Args:
            report: What must be equal on every rank, by name.
            error: Why this rank could not do its part. It passes the error instead of raising it,
                so that the others do not wait for it.
            note: A text for the other ranks, which may differ.
            by_store: Whether to use the store if there is one; else it is one collective, which is
                faster.

        Returns:
            The different notes of all ranks.

        Raises:
            RanksError: The reports differ, a rank has an error, or a rank is lost.
        """
        text = encode_report(report, error, note)
        if self.link is not None and by_store:
            texts = self._exchange(self.link, text)
        else:
            texts = self._exchange_by_collective(text)
        answers = {rank: json.loads(text) for rank, text in texts.items()}
        if fault := list_errors({rank: answer["error"] for rank, answer in answers.items()}):
            raise RanksError(fault)
        if fault := find_difference({rank: answer["report"] for rank, answer in answers.items()}):
            raise RanksError(fault)
        return tuple(dict.fromkeys(answer["note"] for answer in answers.values() if answer["note"]))

    def software_versions(self) -> dict[str, str]:
        """What must be equal on every rank for them to run together at all."""
        return {
            "world size": str(self.tp_size),
            "shardkit": __version__,
            "torch": torch.__version__,
            "device type": self.device.type,
        }

    def set_status(self, status: str) -> None:
        """Tell the other ranks what this rank is doing, for when they wait for it."""
        if self.link is not None:
            self.link.status = status

    def join(self, link: Link) -> None:
        """Find the other ranks, compare versions, and make the process group. Raises RanksError."""
        self.link = link
        self.failure = "the ranks have not joined"
        try:
            texts = link.join(json.dumps(self.software_versions()), _compare_versions)
        except RanksError as error:
            self.failure = str(error)
            raise
        self.failure = _compare_versions(texts)
        if self.failure:
            raise RanksError(self.failure)
        is_cpu = self.device.type == "cpu"
        try:
            interface = agree_on_network(link) if is_cpu else ""
            self._run("init_process_group", lambda: self._open(interface))
            self.transport = share_memory(link) if is_cpu else None
        except RanksError as error:
            self.failure = str(error)
            raise

    def leave(self) -> None:
        """Leave the process group, together with the others if they come within a few seconds.

        A process group that outlives the interpreter aborts the process, so nothing may hold on
        to it.
        """
        link, self.link = self.link, None
        if link is not None:
            link.leave(self.failure, self._close)
        self.failure = self.failure or "this rank has left the group"

    @property
    def carrier(self) -> Transport:
        """What carries tensors."""
        return self.transport or TorchTransport(self.process_group)

    def _run(self, name: str, collective: Callable[[], T]) -> T:
        """What one collective returns; if it fails, end the group and say who is the cause."""
        if self.failure:
            raise RanksLost(self.failure)
        self.num_collectives += 1
        numbered = f"{name} #{self.num_collectives}"
        self.set_status(f"in {numbered}")
        reason = ""
        try:
            result = collective()
        except (RuntimeError, ValueError, OSError) as error:
            reason = first_sentence(error)
        if reason:  # out of `except`, since the exception holds the group, which must be closed
            self._fail(numbered, reason)
        self.set_status(f"after {numbered}")
        return result

    def _fail(self, collective: str, reason: str) -> NoReturn:
        self.failure = f"{collective} failed: {reason}"
        if self.link is not None:
            self.failure = self.link.diagnose(collective, reason, self._close)
        raise RanksLost(self.failure)

    def _exchange(self, link: Link, text: str) -> dict[int, str]:
        if self.failure:
            raise RanksLost(self.failure)
        try:
            return link.all_exchange(text, link.timeouts.load)
        except RanksLost as error:
            self.failure = str(error)  # so that this rank waits for no other when it leaves
            raise

    def _exchange_by_collective(self, text: str) -> dict[int, str]:
        """Every rank's text, by one all-gather of a fixed size, which needs no store."""
        if self.tp_size == 1:
            return {0: text}
        padded = bytearray(text.encode().ljust(REPORT_BYTES))
        own = torch.frombuffer(padded, dtype=torch.uint8).to(self.device)
        every = self._concatenate(own, [REPORT_BYTES] * self.tp_size).cpu()
        parts = torch.split(every, REPORT_BYTES)
        return {rank: bytes(part.tolist()).decode() for rank, part in enumerate(parts)}

    def _concatenate(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        carry = self.carrier
        return self._run("all_gather", lambda: carry.gather_ranks(x, sizes))

    def _open(self, interface: str) -> None:
        assert self.link is not None
        timeouts, on_gpu = self.link.timeouts, self.device.type == "cuda"
        if interface:
            os.environ[INTERFACE] = interface  # which torch reads
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("group", connect_store(False, timeouts.join)),
            rank=self.tp_rank,
            world_size=self.tp_size,
            timeout=timedelta(seconds=timeouts.collective),
            device_id=self.device if on_gpu else None,
        )
        self.process_group = dist.group.WORLD

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        self.process_group = self.transport = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _compare_versions(texts: Mapping[int, str]) -> str:
    return find_difference({rank: json.loads(text) for rank, text in texts.items()})
