"""Which ranks' files a verification checks, and whose data it reads."""

from dataclasses import dataclass

from shardkit.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Scope:
    """The files that are checked; all of them by default.

    A subset consists of entire rank files, every t-th: a file has one running digest, so a stretch
    of it cannot be checked without everything before it. The subsets 1/t to t/t are the folder.

    Attributes:
        rank: Check the file of this rank only, which is what its host needs.
        subset: `(n, t)`: read the data of the n-th of t subsets, and the other files' headers.
        quick: Read no shard data: only sizes, headers and the small files.
    """

    rank: int | None = None
    subset: tuple[int, int] | None = None
    quick: bool = False

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self == Scope()

    def ranks_checked(self, tp_size: int) -> list[int]:
        """The ranks whose files must exist, with the right size and header.

        Raises:
            LayoutError: The folder has no such rank or subset.
        """
        if self.rank is None:
            return list(range(tp_size))
        if not 0 <= self.rank < tp_size:
            raise LayoutError(f"rank {self.rank}: the folder has the ranks 0 to {tp_size - 1}")
        return [self.rank]

    def ranks_read(self, tp_size: int) -> list[int]:
        """The ranks whose files are read to the end.

        Raises:
            LayoutError: The folder has no such rank or subset.
        """
        if self.quick:
            return []
        if self.subset is None:
            return self.ranks_checked(tp_size)
        part, parts = self.subset
        if not 1 <= part <= parts <= tp_size:
            raise LayoutError(
                f"subset {part}/{parts}: a subset is entire rank files, and {tp_size} ranks make at"
                f" most {tp_size} subsets: 1/{tp_size} to {tp_size}/{tp_size}"
            )
        return list(range(part - 1, tp_size, parts))


EVERYTHING = Scope()
