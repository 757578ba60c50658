"""The running sha256 of a rank's file, compared with the manifest at the end of every piece."""

from hashlib import sha256
from pathlib import Path

from shardkit.errors import VerifyError
from shardkit.planning import Rank
from shardkit.shards.manifest import PREFIX_DIGITS, Manifest


class RankDigest:
    """Takes a rank's file from its first piece on, in order, and finds where damage begins.

    Args:
        folder: The shard folder.
        manifest: Its manifest.
        rank: Whose file; its header is hashed already, as the manifest makes it.
        header: That header, if the caller has it.

    Attributes:
        offset: The byte of the file that is to be hashed next.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, rank: Rank, header: bytes | None = None
    ) -> None:
        header = header or manifest.rank_header(rank)
        self.offset = len(header)
        self._file = manifest.ranks[rank.index]
        self._name = f"{folder / self._file.name}: rank {rank.index}"
        pieces, names = self._file.pieces, (p.spec.name for p in manifest.storage_order)
        self._pieces = [(name, pieces[name]) for name in names if name in pieces]
        self._passed = 0  # pieces that are hashed and right
        self._sha256 = sha256(header)

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return self._file.digest.size

    def update(self, view: memoryview) -> None:
        """Hash the next bytes. Raises VerifyError naming the tensor in which damage begins."""
        while view:
            part = view[: self._find_piece_end() - self.offset]
            self._sha256.update(part)
            self.offset += len(part)
            view = view[len(part) :]
        self._find_piece_end()

    def finish(self) -> None:
        """Once all is hashed: raise VerifyError unless the sha256 is the manifest's."""
        self._find_piece_end()
        if self._sha256.hexdigest() != self._file.digest.sha256:
            raise VerifyError(
                f"{self._name}: sha256 {self._sha256.hexdigest()} is not the manifest's"
            )

    def _find_piece_end(self) -> int:
        """Where the piece ends that the next byte is of, those before it compared."""
        while self._passed < len(self._pieces):
            stop = self._find_stop(self._passed)
            if self.offset < stop:
                return stop
            prefix = self._pieces[self._passed][1].prefix_sha256
            if self._sha256.hexdigest()[:PREFIX_DIGITS] != prefix:
                raise VerifyError(self._describe_damage())
            self._passed += 1
        return self.size

    def _find_stop(self, at: int) -> int:
        """Where a piece ends: pieces cover a file without gaps."""
        return self._pieces[at + 1][1].offset if at + 1 < len(self._pieces) else self.size

    def _describe_damage(self) -> str:
        """Where damage begins. Digests run on, so they say nothing of what follows."""
        name, piece = self._pieces[self._passed]
        return (
            f"{self._name}: {name}: damaged between byte {piece.offset} and"
            f" {self._find_stop(self._passed)}; the {self._passed} tensors before it are intact,"
            f" the {len(self._pieces) - self._passed - 1} after it were not checked; restore the"
            " file, or split again"
        )
