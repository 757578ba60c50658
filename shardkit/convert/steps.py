"""What split, merge and reshard share: open an output, copy into it, and its companion files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

from shardkit.errors import VerifyError
from shardkit.files import Progress
from shardkit.output import (
    BlockReader,
    Destination,
    Files,
    FileWriter,
    Inspection,
    RunIdentity,
    StagingFolder,
    TensorCopy,
    as_output_error,
    copy_tensors,
    open_writers,
    publish_folder,
    remaining_copies,
)
from shardkit.shards import CheckedShards, Digest, Manifest, ShardedCheckpoint, read_companion


@contextmanager
def open_output(
    destination: Destination,
    run: RunIdentity,
    files: Files,
    progress: Progress,
    inspection: Inspection | None = None,
) -> Iterator[tuple[StagingFolder, list[FileWriter]]]:
    """A staging folder with a writer for each file, published if the block succeeds."""
    with publish_folder(destination) as stage:
        yield stage, open_writers(stage, run, files, progress, inspection)


def copy_into(
    stage: StagingFolder,
    files: Files,
    writers: Sequence[FileWriter],
    reader: BlockReader,
    copies: Sequence[TensorCopy],
    progress: Progress,
    buffer_bytes: int | None = None,
) -> None:
    """Make the copies that an interrupted run has not made, and sync the files."""
    with as_output_error(stage.folder):
        remaining = list(remaining_copies(copies, writers))
        copy_tensors(reader, remaining, writers, progress, buffer_bytes)
    stage.sync_files(files)


def copy_shards_into(
    stage: StagingFolder,
    files: Files,
    writers: Sequence[FileWriter],
    shards: ShardedCheckpoint,
    copies: Sequence[TensorCopy],
    progress: Progress,
    buffer_bytes: int | None = None,
) -> None:
    """As `copy_into`, of a shard folder, every byte of which is hashed on the way.

    Raises VerifyError, naming every damaged file, if the bytes are not those that were written.
    """
    reader = CheckedShards(shards, progress)
    try:
        copy_into(stage, files, writers, reader, copies, progress, buffer_bytes)
        reader.finish()
    except VerifyError as fault:
        raise reader.explain(fault) from None


def write_companions(
    stage: StagingFolder, companions: Iterable[tuple[str, bytes]]
) -> dict[str, Digest]:
    """Write the small files beside the weights, by name and bytes; the digest of each."""
    digests = {}
    for name, data in companions:
        stage.write(name, data)
        digests[name] = Digest(len(data), sha256(data).hexdigest())
    return digests


def read_shard_companions(shards: ShardedCheckpoint) -> Iterator[tuple[str, bytes]]:
    """The companion files of a shard folder, their digests checked. Raises ManifestError."""
    for name in shards.manifest.companion_files:
        yield name, read_companion(shards.folder, shards.manifest, name)


def count_companion_bytes(manifest: Manifest) -> int:
    """The bytes of a shard folder's companion files."""
    return sum(digest.size for digest in manifest.companion_files.values())
