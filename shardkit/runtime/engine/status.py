"""What an engine says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine is doing, and what it can do.

    Attributes:
        alive: Whether its ranks can be used, and it is not closed.
        failure: Why no rank can be used any more; "" if all can.
        draining: Whether it finishes what it has, and takes no more.
        tp_size: The number of ranks.
        rank_pids: Their process ids, by rank; none under torchrun.
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
    draining: bool
    tp_size: int
    rank_pids: tuple[int, ...]
    running: int
    waiting: int
    steps: int
    tokens: int
    max_batch_size: int
    max_batch_tokens: int
    obstacle: str
