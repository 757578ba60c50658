"""What is to be verified, against what, how deep and how: options as values, checked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from shardkit.errors import UsageError
from shardkit.runtime.distributed.rank_environment import is_rank
from shardkit.timeouts import Timeouts
from shardkit.verification.numerics_options import NumericsOptions, RankChoice
from shardkit.verification.scope import Scope

Level = Literal["files", "weights", "numerics"]
LEVELS: tuple[Level, ...] = get_args(Level)
REDUCE_DTYPES = ("bfloat16",)
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify, against what, how deep, and how to run it."""

    folder: Path
    source: str | None
    level: Level
    scope: Scope
    revision: str | None
    allow_pickle: bool
    dtype: str | None
    device: str | None
    numerics: NumericsOptions
    timeouts: Timeouts

    @property
    def runs_numerics(self) -> bool:
        """Whether the model will be run."""
        return self.level == "numerics" and self.source is not None


def choose_level(scope: Scope, level: Level | None) -> Level:
    """The deepest level that a scope allows, unless one is given. Raises UsageError."""
    if scope.subset and (scope.quick or scope.rank is not None):
        raise UsageError(
            "--subset selects whose data is read: it cannot be combined with --quick or --rank"
        )
    deepest: Level = "files" if scope.quick else "numerics" if scope.is_everything else "weights"
    if level is None:
        return deepest
    if level not in LEVELS:
        raise UsageError(f"level {level!r}: it must be one of {', '.join(LEVELS)}")
    if LEVELS.index(level) > LEVELS.index(deepest):
        raise UsageError(
            f"--level {level} needs more data than --quick, --rank or --subset leave to be read"
        )
    return level


def check_numerics_options(options: NumericsOptions) -> NumericsOptions:
    """The options with the ranks that there will be: torchrun's are real.

    What goes block by block needs ranks in turns.

    Raises UsageError for options that contradict each other.
    """
    ranks = options.ranks
    if ranks not in get_args(RankChoice):
        raise UsageError(f"ranks {ranks!r}: they must be one of {', '.join(get_args(RankChoice))}")
    is_torchrun = is_rank()
    _check_reduce_dtype(options, is_torchrun)
    block_options = {"--sample": options.sample, "--resume": options.resume}
    by_block = [name for name, value in block_options.items() if value is not None]
    if by_block and (ranks == "real" or is_torchrun):
        raise UsageError(f"{by_block[0]} goes block by block: it needs --ranks turns, no torchrun")
    if is_torchrun and ranks == "turns":
        raise UsageError("--ranks turns runs every rank in one process: start it without torchrun")
    if is_torchrun:
        return replace(options, ranks="real")
    return replace(options, ranks="turns") if by_block else options


def _check_reduce_dtype(options: NumericsOptions, is_torchrun: bool) -> None:
    """Raise UsageError for a dtype of sums that is none, or with what cannot check it."""
    if (name := options.reduce_dtype) is None:
        return
    if name not in REDUCE_DTYPES:
        raise UsageError(f"reduce_dtype {name!r}: it must be {' or '.join(REDUCE_DTYPES)}")
    if options.resume is not None or is_torchrun:
        other = "torchrun" if is_torchrun else "--resume"
        raise UsageError(f"--reduce-dtype runs the ranks in turns once more: leave out {other}")


def name_dtype(dtype: object) -> str | None:
    """The name of a dtype that models compute in. Raises UsageError for any other."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}: it must be one of {', '.join(DTYPES)}")
    return name
