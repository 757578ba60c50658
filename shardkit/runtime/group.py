"""The ranks of one model: how they find each other, agree, and sum and gather tensors."""

import atexit
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardkit.errors import RanksError

JOIN_TIMEOUT = 60.0  # seconds for every rank to arrive
COLLECTIVE_TIMEOUT = 300.0  # seconds for one collective, never torch's own 30 minutes
LEAVE_TIMEOUT = 5.0  # seconds a rank that is done waits for the others to be done
REPORT_BYTES = 4096


@dataclass
class TensorParallelGroup:
    """A rank's place among the ranks, and its collectives, which are counted.

    `store` is set only where this process group was made here; ranks then agree through it, before
    any collective.
    """

    tp_rank: int
    tp_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"all_reduce": 0, "all_gather": 0})
    turns: int = 0  # how often the ranks have agreed through the store

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in place."""
        self.counts["all_reduce"] += 1
        if self.tp_size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.process_group)
        return x

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's `x` `[..., sizes[rank]]` joined along the last dimension."""
        self.counts["all_gather"] += 1
        if self.tp_size == 1:
            return x
        widest = max(sizes)
        padded = F.pad(x, (0, widest - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.process_group)
        return torch.cat([p[..., :size] for p, size in zip(parts, sizes, strict=True)], -1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, on every rank."""
        if self.tp_size > 1:
            x = x.to(self.device)
            source = dist.get_global_rank(self.process_group, 0) if self.process_group else 0
            dist.broadcast(x, source, group=self.process_group)
        return x

    def agree(self, report: Mapping[str, str], error: str = "", note: str = "") -> tuple[str, ...]:
        """Raise RanksError on every rank alike unless all report the same and none an error.

        A rank that could not do its part passes its `error` instead of raising it, so that the
        others are not left waiting.  Returns the different notes that the ranks have passed.
        """
        told = {"error": error[: REPORT_BYTES // 2], "note": note[: REPORT_BYTES // 8]}
        mine = json.dumps({**report, **told}).encode()
        said = self._by_store(mine) if self.store is not None else self._by_gather(mine)
        reports: list[dict[str, str]] = [json.loads(text) for text in said]
        faults = [
            f"rank {r}: {found['error']}" for r, found in enumerate(reports) if found["error"]
        ]
        if faults:
            raise RanksError(faults[0] if len(set(_causes(reports))) == 1 else "; ".join(faults))
        for rank, found in enumerate(reports):
            for key in report:
                if found.get(key) != reports[0].get(key):
                    raise RanksError(
                        f"rank {rank} has {key} {found.get(key)}, rank 0 has"
                        f" {reports[0].get(key)}: every rank must load the same shard folder"
                    )
        return tuple(dict.fromkeys(found["note"] for found in reports if found["note"]))

    def leave(self) -> None:
        """Leave the process group, together with the others if they come within a few seconds.

        A rank that is still in a collective when its peer leaves fails; and a process group that
        outlives the interpreter aborts the process, so nothing may hold on to it.
        """
        store, self.store, self.process_group = self.store, None, None
        if store is None or not dist.is_initialized():
            return
        with contextlib.suppress(RuntimeError, OSError):
            store.set(f"shardkit/left/{self.tp_rank}", "1")
            left = [f"shardkit/left/{rank}" for rank in range(self.tp_size)]
            store.wait(left, timedelta(seconds=LEAVE_TIMEOUT))
        dist.destroy_process_group()

    def _by_store(self, mine: bytes) -> list[bytes]:
        """Exchange through the rendezvous store, which needs no working collective."""
        assert self.store is not None
        turn, self.turns = self.turns, self.turns + 1
        self.store.set(f"shardkit/{turn}/{self.tp_rank}", mine.decode())
        said = [_wait_for(self.store, f"shardkit/{turn}/{r}", r) for r in range(self.tp_size)]
        self.store.set(f"shardkit/{turn}/read/{self.tp_rank}", "1")
        if self.tp_rank == 0:  # it may host the store: stay until the others have read
            for rank in range(self.tp_size):
                _wait_for(self.store, f"shardkit/{turn}/read/{rank}", rank)
        return said

    def _by_gather(self, mine: bytes) -> list[bytes]:
        """Exchange by one all-gather of a fixed size, in a process group that others made."""
        if self.tp_size == 1:
            return [mine]
        mine = mine[:REPORT_BYTES].ljust(REPORT_BYTES)
        sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.tp_size)]
        dist.all_gather(parts, sent, group=self.process_group)
        return [bytes(part.cpu().tolist()) for part in parts]


def connect(
    device: torch.device | str | None = None,
    timeout: float = COLLECTIVE_TIMEOUT,
    store: dist.Store | None = None,
) -> TensorParallelGroup:
    """Join the ranks: the process group there is, or a new one as torchrun's environment says.

    gloo on a CPU, NCCL on a GPU; alone without torchrun.  `timeout` in seconds bounds every
    collective.  Raises RanksError if the ranks do not all arrive.
    """
    device = pick_device(device)
    if dist.is_initialized():
        return TensorParallelGroup(
            dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, None
        )
    if "WORLD_SIZE" not in os.environ:
        return TensorParallelGroup(0, 1, device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        if store is None:
            found = dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT))
            store, rank, size = next(iter(found))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("shardkit-group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise RanksError(f"rank {rank} of {size} could not join the others: {reason}") from None
    group = TensorParallelGroup(rank, size, device, dist.group.WORLD, store)
    atexit.register(group.leave)
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


def _wait_for(store: dist.Store, key: str, rank: int) -> bytes:
    try:
        store.wait([key], timedelta(seconds=JOIN_TIMEOUT))
        found: bytes = store.get(key)
    except (RuntimeError, OSError):
        raise RanksError(f"rank {rank} did not report within {JOIN_TIMEOUT:.0f} s") from None
    return found


def _causes(reports: Sequence[Mapping[str, str]]) -> list[str]:
    return [found["error"] for found in reports]
