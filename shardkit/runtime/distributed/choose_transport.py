"""Which way tensors travel: over memory that the ranks share, if all of them can, on a CPU."""

import json
import os
import secrets
from contextlib import suppress
from typing import Any

from shardkit.runtime.distributed.cores import count_cores
from shardkit.runtime.distributed.liveness import Link
from shardkit.runtime.distributed.shared_memory import (
    TOKEN_BYTES,
    SharedMemoryTransport,
    create_memory,
    explain_absence,
    open_memory,
)

SWITCH = "SHARDKIT_SHARED_MEMORY"  # 0: never; 1: even if there are fewer cores than ranks


def share_memory(link: Link) -> SharedMemoryTransport | None:
    """The memory that ranks share; None, on every rank alike, if one of them cannot or would not.

    Ranks that wait for each other look again and again, so there must be a core for each.

    Raises:
        RanksError: A rank was lost meanwhile.
    """
    offer: dict[str, Any] = {"absence": explain_absence() or _explain_refusal(link.size)}
    fd = -1
    if not offer["absence"]:
        token = secrets.token_bytes(TOKEN_BYTES)
        fd = create_memory(link.size, token) if link.rank == 0 else -1
        offer |= {"pid": os.getpid(), "fd": fd, "token": token.hex()}
    try:
        texts = link.all_exchange(json.dumps(offer), link.timeouts.join)
        offers = [json.loads(texts[rank]) for rank in range(link.size)]
        if any(each["absence"] for each in offers):
            return None
        transport = _open_transport(link, offers)
        answers = link.all_exchange("1" if transport else "0", link.timeouts.join)
    finally:
        if fd >= 0:
            os.close(fd)
    if transport is not None and "0" in answers.values():
        transport.close()
        return None
    return transport


def _open_transport(link: Link, offers: list[dict[str, Any]]) -> SharedMemoryTransport | None:
    first = offers[0]
    with suppress(OSError):
        token = bytes.fromhex(first["token"])
        memory = open_memory(first["pid"], first["fd"], link.size, token)
        pids = [each["pid"] for each in offers]
        return SharedMemoryTransport(memory, link.rank, pids, link.timeouts.collective)
    return None


def _explain_refusal(size: int) -> str:
    """Why this process would rather not; "" if it would."""
    switch, cores = os.environ.get(SWITCH, ""), count_cores()
    if switch == "0":
        return f"{SWITCH} is 0"
    if size == 1:
        return "one rank alone"
    if switch != "1" and cores < size:
        return f"{cores} cores for {size} ranks"
    return ""
