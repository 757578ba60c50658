"""The ranks of one model: how they find each other, agree, and sum and gather tensors."""

import atexit
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardkit import __version__
from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.diagnosis import brief, differences, errors
from shardkit.runtime.distributed.liveness import Link
from shardkit.runtime.distributed.rendezvous import connect_store
from shardkit.timeouts import Timeouts

REPORT_BYTES = 4096
DEFAULT = Timeouts()


@dataclass
class TensorParallelGroup:
    """A rank's place among the ranks, and its collectives, which are counted.

    `link` is set only where this process group was made here: through it ranks agree before any
    collective, and find out who is missing when one fails.  A failed collective ends the group.
    """

    tp_rank: int
    tp_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None
    link: Link | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"all_reduce": 0, "all_gather": 0})
    steps: int = 0  # collectives so far, of any kind
    lost: str = ""  # why there is no group any more

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in place.  Raises RanksError, as all collectives do."""
        self.counts["all_reduce"] += 1
        if self.tp_size > 1:
            x = x.contiguous()
            self._together("all_reduce", lambda: dist.all_reduce(x, group=self.process_group))
        return x

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's `x` `[..., sizes[rank]]` joined along the last dimension."""
        self.counts["all_gather"] += 1
        if self.tp_size == 1:
            return x
        padded = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
        parts = self._parts(padded)
        return torch.cat([p[..., :size] for p, size in zip(parts, sizes, strict=True)], -1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, on every rank."""
        if self.tp_size > 1:
            x = x.to(self.device)
            source = dist.get_global_rank(self.process_group, 0) if self.process_group else 0
            self._together("broadcast", lambda: dist.broadcast(x, source, self.process_group))
        return x

    def agree(
        self, report: Mapping[str, str], error: str = "", note: str = "", by_store: bool = True
    ) -> tuple[str, ...]:
        """Raise RanksError on every rank alike unless all report the same and none an error.

        A rank that could not do its part passes its `error` instead of raising it, so that the
        others are not left waiting.  Without `by_store` it is a collective, and quick.  Returns the
        different notes that the ranks have passed.
        """
        mine = _report(report, error, note)
        if self.link is not None and by_store:
            said = self._exchange(self.link, mine)
        else:
            said = self._by_gather(mine)
        told = {rank: json.loads(text) for rank, text in said.items()}
        if fault := errors({rank: one["error"] for rank, one in told.items()}):
            raise RanksError(fault)
        if fault := differences({rank: one["report"] for rank, one in told.items()}):
            raise RanksError(fault)
        return tuple(dict.fromkeys(one["note"] for one in told.values() if one["note"]))

    def itself(self) -> dict[str, str]:
        """What every rank must have alike to run with the others at all."""
        return {
            "world size": str(self.tp_size),
            "shardkit": __version__,
            "torch": torch.__version__,
            "device type": self.device.type,
        }

    def doing(self, what: str) -> None:
        """Let the others know what this rank does, for when they wait for it."""
        if self.link is not None:
            self.link.at = (what,)

    def join(self, link: Link) -> None:
        """Meet the other ranks, compare, and make the process group.  Raises RanksError."""
        self.link = link
        self.lost = "these ranks have not met"
        try:
            said = link.meet(json.dumps(self.itself()), _unlike)
        except RanksError as error:
            self.lost = str(error)
            raise
        self.lost = _unlike(said)
        if self.lost:
            raise RanksError(self.lost)
        self._together("the making of the group", self._open)

    def leave(self) -> None:
        """Leave the process group, together with the others if they come within a few seconds.

        A process group that outlives the interpreter aborts the process, so nothing may hold on
        to it.
        """
        link, self.link = self.link, None
        if link is not None:
            link.leave(self.lost, self._close)
        self.lost = self.lost or "this rank has left the others"

    def _together(self, name: str, act: Callable[[], object]) -> None:
        """Run one collective; a failure ends the group, and is told with the rank to blame."""
        if self.lost:
            raise RanksLost(self.lost)
        self.steps += 1
        if self.link is not None:
            self.link.at = "in", name, self.steps
        reason = ""
        try:
            act()
        except (RuntimeError, ValueError, OSError) as error:
            reason = brief(error)
        if reason:  # here, since the exception holds the group, whose closing tells the others
            self._lose(f"{name} {self.steps}", reason)
        if self.link is not None:
            self.link.at = "after", name, self.steps

    def _lose(self, doing: str, reason: str) -> NoReturn:
        self.lost = f"{doing} failed: {reason}"
        if self.link is not None:
            self.lost = self.link.explain(doing, reason, self._close)
        raise RanksLost(self.lost)

    def _exchange(self, link: Link, mine: str) -> dict[int, str]:
        if self.lost:
            raise RanksLost(self.lost)
        try:
            return link.exchange(mine, link.timeouts.load)
        except RanksLost as error:
            self.lost = str(error)  # so that this rank waits for no other when it leaves
            raise

    def _open(self) -> None:
        assert self.link is not None
        timeouts, on_gpu = self.link.timeouts, self.device.type == "cuda"
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
        self.process_group = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        self._together("all_gather", lambda: dist.all_gather(parts, x, group=self.process_group))
        return parts

    def _by_gather(self, mine: str) -> dict[int, str]:
        """Exchange by one all-gather of a fixed size, which needs no store."""
        if self.tp_size == 1:
            return {0: mine}
        padded = bytearray(mine.encode().ljust(REPORT_BYTES))
        parts = self._parts(torch.frombuffer(padded, dtype=torch.uint8).to(self.device))
        return {rank: bytes(part.cpu().tolist()).decode() for rank, part in enumerate(parts)}


_joined: list[TensorParallelGroup] = []  # the group that was made here, if one was


def connect(
    device: torch.device | str | None = None, timeouts: Timeouts = DEFAULT
) -> TensorParallelGroup:
    """Join the ranks: the process group there is, or a new one as torchrun's environment says.

    gloo on a CPU, NCCL on a GPU; alone without torchrun.  Raises RanksError, naming the rank, if
    the ranks do not all arrive, or differ in world size, kind of device or version.
    """
    device = pick_device(device)
    if dist.is_initialized():
        if _joined and _joined[0].process_group is not None:
            return _joined[0]
        return TensorParallelGroup(
            dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, None
        )
    if "WORLD_SIZE" not in os.environ:
        return TensorParallelGroup(0, 1, device)
    rank, size = _place()
    group = TensorParallelGroup(rank, size, device)
    link = Link(rank, size, timeouts)
    atexit.register(group.leave)
    group.join(link)
    _joined[:] = [group]
    return group


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or this local rank's GPU, or the CPU."""
    if device is not None and str(device) != "cuda":
        return torch.device(device)
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device is not None:
        raise RanksError("device cuda: torch sees no GPU; use --device cpu")
    return torch.device("cpu")


def _place() -> tuple[int, int]:
    """RANK and WORLD_SIZE.  Raises RanksError for what is no place among ranks."""
    rank, size = os.environ.get("RANK", ""), os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise RanksError(f"RANK={rank} of WORLD_SIZE={size}: no such rank; start them by torchrun")
    if not os.environ.get("MASTER_PORT", "").isdecimal():
        raise RanksError("WORLD_SIZE is set, but no MASTER_PORT; start the ranks by torchrun")
    return int(rank), int(size)


def _unlike(said: Mapping[int, str]) -> str:
    return differences({rank: json.loads(text) for rank, text in said.items()})


def _report(report: Mapping[str, str], error: str, note: str) -> str:
    """What a rank says, as JSON of at most REPORT_BYTES; texts give way."""
    while True:
        text = json.dumps({"report": dict(report), "error": error, "note": note})
        if len(text) <= REPORT_BYTES or not (error or note):
            return text
        error, note = error[: len(error) // 2], note[: len(note) // 2]
