"""How numerics are compared, as values that need no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RankChoice = Literal["auto", "real", "turns"]
BlockProgress = Callable[[int, int], object]
"""Is called with how many calls of blocks are done, and about how many there will be."""


def ignore_blocks(_done: int, _total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class NumericsOptions:
    """How the level numerics is run.

    Attributes:
        ranks: "real" for a process each, "turns" for ranks that take turns in this process, block
            by block, in bounded memory; "auto" for real ones if everything fits at once.
        max_memory: Bytes that may be taken (default: what is free here, less a tenth).
        sample: Of each list of layers, compare the first of each kind, the last, and so many drawn
            at random; ranks take turns then. None for every block.
        seed: What a sample is drawn from.
        progress: Called as blocks are done.
        resume: A file to note what is done in, and to resume from if the verification was stopped;
            ranks take turns then. It is removed when the verification has finished.
        reduce_dtype: "bfloat16" to also run the shards with sums that are sent in it; ranks take
            turns for that.
    """

    ranks: RankChoice = "auto"
    max_memory: int | None = None
    sample: int | None = None
    seed: int = 0
    progress: BlockProgress = ignore_blocks
    resume: Path | None = None
    reduce_dtype: str | None = None


DEFAULT_NUMERICS = NumericsOptions()
