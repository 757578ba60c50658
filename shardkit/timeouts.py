"""How long ranks wait for each other, in seconds."""

import math
from dataclasses import dataclass, fields

from shardkit.errors import RanksError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds after which a rank that others wait for is considered lost.

    Args:
        join: For every rank to join the group.
        load: For every rank to load its shard.
        collective: For one collective, and without a heartbeat of a rank.
        request: For ranks that one process controls to answer, or to generate the next token.

    Raises:
        RanksError: A number is not finite and above 0.

    Example:
        >>> Timeouts(load=1800).collective
        30.0
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


DEFAULT_TIMEOUTS = Timeouts()
