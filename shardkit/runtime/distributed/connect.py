"""Joins the ranks that torchrun or `launch` started."""

import atexit

import torch
import torch.distributed as dist

from shardkit.errors import RanksError
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.liveness import Link
from shardkit.runtime.distributed.rank_environment import read_local_rank, read_place
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts

_groups: list[TensorParallelGroup] = []  # the group that `connect` made, if it did


def connect(
    device: torch.device | str | None = None, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> TensorParallelGroup:
    """Join the ranks that torchrun started, or adopt the process group that exists.

    Args:
        device: Where to compute; None means this local rank's GPU, or else the CPU. The backend is
            NCCL on a GPU, and on a CPU gloo; ranks of one host with a core for each also share
            memory, which is faster (`SHARDKIT_SHARED_MEMORY=0` turns it off).
        timeouts: How long to wait for other ranks.

    Returns:
        The group; of one rank if torchrun's environment variables are not set.

    Raises:
        RanksError: A rank does not join in time, or the ranks differ in world size, kind of device
            or version; the message names the rank.
    """
    device = pick_device(device)
    if dist.is_initialized():
        if _groups and _groups[0].process_group is not None:
            return _groups[0]
        return TensorParallelGroup(
            dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, None
        )
    place = read_place()
    if place is None:
        return TensorParallelGroup(0, 1, device)
    group = TensorParallelGroup(place.rank, place.size, device)
    link = Link(place.rank, place.size, timeouts)
    atexit.register(group.leave)
    group.join(link)
    _groups[:] = [group]
    return group


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or this local rank's GPU, or the CPU. Raises RanksError."""
    if device is not None and str(device) != "cuda":
        return torch.device(device)
    if torch.cuda.is_available():
        index = read_local_rank() % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device is not None:
        raise RanksError("device cuda: torch sees no GPU; use --device cpu")
    return torch.device("cpu")
