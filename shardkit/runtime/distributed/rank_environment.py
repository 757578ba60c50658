"""The environment variables by which torchrun, or `launch`, tells a process which rank it is.

They are read and made here alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shardkit.errors import RanksError

ELASTIC = "TORCHELASTIC_"  # how the names begin of what torchrun says of itself
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank a process is, of how many."""

    rank: int
    size: int


def is_rank() -> bool:
    """Whether this process was started as a rank."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_follower() -> bool:
    """Whether it was started as another rank than 0, which alone speaks for all."""
    return is_rank() and os.environ["RANK"] != "0"


def read_place() -> RankPlace | None:
    """This rank's place; None if nothing says that it is a rank.

    Raises:
        RanksError: The variables are not those of a rank.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    rank, size = os.environ.get("RANK", ""), os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise RanksError(f"RANK={rank} of WORLD_SIZE={size}: no such rank; start them by torchrun")
    if not os.environ.get("MASTER_PORT", "").isdecimal():
        raise RanksError("WORLD_SIZE is set, but no MASTER_PORT; start the ranks by torchrun")
    return RankPlace(int(rank), int(size))


def read_local_rank() -> int:
    """This rank's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count_local_ranks() -> int:
    """How many ranks this host has; all of them if nothing says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def read_store_address() -> tuple[str, int]:
    """The host and port of the rendezvous store."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])


def has_agent_store() -> bool:
    """Whether torchrun, or whatever started the ranks, hosts the store; else rank 0 does."""
    return os.environ.get(AGENT_STORE) == "True"


def read_attempt() -> str:
    """How often torchrun has started these ranks anew."""
    return os.environ.get(ELASTIC + "RESTART_COUNT", "0")


def make_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of a rank on this host, whose starter hosts the store at `port`."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if size == 1:  # which has nobody to meet
        return place
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), AGENT_STORE: "True"}
    return {**place, "WORLD_SIZE": str(size), **store}


def apply_variables(variables: Mapping[str, str]) -> None:
    """Give this process the variables of a rank, and none that its own starter had as one."""
    for name in [n for n in os.environ if n in NAMES or n.startswith(ELASTIC)]:
        del os.environ[name]
    os.environ.update(variables)
