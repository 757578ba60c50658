"""What an engine says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine is doing, and what it can do.

    Attributes:
        alive: Whether it takes requests.
        failure: Why not; "" if it does.
        running: Sequences and calls that run.
        waiting: Sequences and calls that wait.
        steps: Steps of generation so far.
        tokens: Tokens generated so far.
        max_batch_size: Sequences that may run together.
        max_batch_tokens: Tokens that the KV cache has room for.
        obstacle: Why sequences cannot join a running batch; "" if they can.
    """

    alive: bool
    failure: str
    running: int
    waiting: int
    steps: int
    tokens: int
    max_batch_size: int
    max_batch_tokens: int
    obstacle: str
