"""Every error a user can meet, and the exit code each one ends the command with.

    ShardkitError          1
    ├── UsageError         2   arguments that contradict each other
    │   └── RequestError   2   a request that no engine would run: a bad parameter or prompt
    ├── RecipeError        1   a recipe is malformed, missing, or does not fit the checkpoint
    ├── LayoutError        1   an axis cannot be divided as asked
    ├── CheckpointError    3   a source is missing, damaged or not to be trusted
    ├── ManifestError      3   a shard folder is missing, unfinished or damaged
    ├── VerifyError        4   shards differ from what they should be
    ├── OutputError        5   the output exists, cannot be written, or has no room
    ├── SourceChanged      6   a source file changed while it was read
    └── RanksError         7   ranks disagree, died, or did not answer in time
        ├── RanksLost      7   a rank died or fell silent: what it ran may be right
        ├── EngineBusy     7   the queue of requests is full
        │   └── EngineDraining 7   the engine finishes what it has, and takes no more
        ├── RequestTimeout 7   a request did not finish in its time
        └── RequestCancelled 7 a request was cancelled

Exit code 2 is also click's own, for wrong usage. The numbers are stable.
"""


class ShardkitError(Exception):
    """What went wrong, in one line: the thing, the number found, the number allowed, a way out."""

    exit_code = 1


class UsageError(ShardkitError):
    """Arguments that contradict each other, or a value that is not one of those allowed."""

    exit_code = 2


class RequestError(UsageError):
    """A request that no engine would run: a misspelt or impossible parameter, or a bad prompt."""


class RecipeError(ShardkitError):
    """A recipe is malformed, missing, or does not fit the checkpoint."""


class LayoutError(ShardkitError):
    """An axis cannot be divided as asked."""


class CheckpointError(ShardkitError):
    """A source is missing, damaged or not to be trusted."""

    exit_code = 3


class ManifestError(ShardkitError):
    """A shard folder is missing, unfinished or damaged."""

    exit_code = 3


class VerifyError(ShardkitError):
    """Shards differ from what they should be."""

    exit_code = 4


class OutputError(ShardkitError):
    """The output exists, cannot be written, or has no room."""

    exit_code = 5


class SourceChanged(ShardkitError):
    """A source file changed while it was read."""

    exit_code = 6


class RanksError(ShardkitError):
    """Ranks disagree, died, or did not answer in time."""

    exit_code = 7


class RanksLost(RanksError):
    """A rank died, stalled or never came: what the others were doing is undecided."""


class EngineBusy(RanksError):
    """The queue of requests is full; send the request again later."""


class EngineDraining(EngineBusy):
    """The engine finishes the requests that it has, and takes no more."""


class RequestTimeout(RanksError):
    """A request did not finish in its time; the engine goes on."""


class RequestCancelled(RanksError):
    """A request was cancelled before it finished."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, printable; its type's name if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0][:limit] if c.isprintable())


# What the model and config classes of transformers raise when they cannot build or run a model.
MODEL_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
