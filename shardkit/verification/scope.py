"""Which ranks' files a verification looks at, and of which it reads the data."""

from dataclasses import dataclass

from shardkit.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Scope:
    """Everything by default; `rank` is what one rank's host needs, `subset` the n-th of t parts.

    A part is whole rank files, every t-th: a file has one running digest, so that a stretch of it
    cannot be judged without all that comes before it.  The parts 1/t to t/t are the whole folder.
    `quick` reads no shard data.
    """

    rank: int | None = None
    subset: tuple[int, int] | None = None
    quick: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self == Scope()

    def looked_at(self, tp_size: int) -> list[int]:
        """The ranks whose files must be there, of the right size and header.

        Raises LayoutError for a rank or a part that there is not.
        """
        if self.rank is None:
            return list(range(tp_size))
        if self.rank >= tp_size:
            raise LayoutError(f"rank {self.rank}: the folder has the ranks 0 to {tp_size - 1}")
        return [self.rank]

    def read(self, tp_size: int) -> list[int]:
        """The ranks whose files are read whole.  Raises LayoutError as `looked_at` does."""
        if self.quick:
            return []
        if self.subset is None:
            return self.looked_at(tp_size)
        part, parts = self.subset
        if not 1 <= part <= parts <= tp_size:
            raise LayoutError(
                f"subset {part}/{parts}: a part is whole rank files, and {tp_size} ranks make at"
                f" most {tp_size} parts: 1/{tp_size} to {tp_size}/{tp_size}"
            )
        return list(range(part - 1, tp_size, parts))
