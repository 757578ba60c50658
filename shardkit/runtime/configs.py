"""The configs that a split has copied: their bytes checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from shardkit.checkpoint.checkpoint import MAX_COMPANION
from shardkit.errors import ManifestError
from shardkit.files import read_small_file
from shardkit.shards.manifest import Manifest

CONFIGS = ("config.json", "generation_config.json")


def read_configs(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The configs that were copied, their bytes checked.  Raises ManifestError."""
    found = {}
    for name in CONFIGS:
        if name in manifest.companion_files:
            data = found[name] = read_small_file(folder / name, MAX_COMPANION, ManifestError)
            if sha256(data).hexdigest() != manifest.companion_files[name].sha256:
                raise ManifestError(
                    f"{folder / name}: not the file that was split with the weights"
                )
    return found


@contextmanager
def checked_copy(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder of the configs alone, for readers that open files: of the bytes that were checked.

    Raises ManifestError.
    """
    with TemporaryDirectory(prefix="shardkit-") as checked:
        for name, data in read_configs(folder, manifest).items():
            Path(checked, name).write_bytes(data)
        yield Path(checked)
