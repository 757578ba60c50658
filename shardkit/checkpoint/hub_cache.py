"""Files of a Hub cache, which are named by what they must hold.

huggingface_hub compares a download's size, not its bytes, and a file that is cached with nothing.
It keeps each as `blobs/<etag>`, and the Hub's ETag is the sha256 of a file in LFS or Xet storage
and the git blob id of any other (huggingface.co/docs/huggingface_hub/guides/manage-cache); some
mirrors give the plain sha1. So the name alone tells whether a file is the Hub's, offline too.
"""

import hashlib
import os
import re
from pathlib import Path

from shardkit.errors import CheckpointError
from shardkit.files import Progress, read_exactly

READ_BYTES = 2 << 20
_NAMES = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)


def is_blob(path: Path) -> bool:
    """Whether a file's name says what it must hold."""
    return path.parent.name == "blobs" and _NAMES.fullmatch(path.name) is not None


def check_blob(path: Path, name: str, fd: int, progress: Progress) -> None:
    """Hash the open file `name` of a snapshot, whose bytes lie in the blob `path`.

    Raises CheckpointError if it is not what its name says.
    """
    size = os.fstat(fd).st_size
    hashes = _start_hashes(path, size)
    buffer = memoryview(bytearray(min(READ_BYTES, size)))
    for at in range(0, size, READ_BYTES):
        view = buffer[: size - at]
        try:
            read_exactly(fd, view, at)
        except OSError as failure:
            raise CheckpointError(f"{path}: cannot be read: {failure.strerror}") from None
        for digest in hashes:
            digest.update(view)
        progress(len(view))
    _compare_digest(path, name, hashes)


def check_bytes(path: Path, name: str, data: bytes) -> None:
    """The same, of a small file that has been read."""
    hashes = _start_hashes(path, len(data))
    for digest in hashes:
        digest.update(data)
    _compare_digest(path, name, hashes)


def _start_hashes(path: Path, size: int) -> "list[hashlib._Hash]":
    if len(path.name) == 64:
        return [hashlib.sha256()]
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return [git, hashlib.sha1(usedforsecurity=False)]


def _compare_digest(path: Path, name: str, hashes: "list[hashlib._Hash]") -> None:
    if path.name not in (digest.hexdigest() for digest in hashes):
        raise CheckpointError(
            f"{name}: not the Hub's file: its bytes have the {hashes[0].name}"
            f" {hashes[0].hexdigest()}; remove {path} and run the same command again"
        )
