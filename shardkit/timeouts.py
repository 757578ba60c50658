"""How long ranks wait for each other, in seconds."""

import math
from dataclasses import dataclass, fields

from shardkit.errors import RanksError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds after which a rank that does not come is given up. Raises RanksError unless > 0.

    `join`: for every rank to arrive. `load`: for every rank to have loaded its shard.
    `collective`: for one collective, and for a rank to be heard of at all. `request`: for an
    answer of ranks that one process controls, or for the next token of it.
    """

    join: float = 60.0
    load: float = 600.0
    collective: float = 30.0
    request: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if not (seconds > 0 and math.isfinite(seconds)):
                raise RanksError(f"timeout {field.name}: {seconds} s; it must be above 0")
