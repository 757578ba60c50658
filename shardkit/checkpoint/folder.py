"""A checkpoint folder: one safetensors file, or several with an index."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit import strict_json
from shardkit.checkpoint import header
from shardkit.checkpoint.index import SUFFIX, Index, read_index
from shardkit.errors import CheckpointError, SourceChanged
from shardkit.files import open_regular, read_small, real_file
from shardkit.tensor import TensorSpec

SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
MAX_CONFIG = 16 << 20
MAX_COMPANION = 256 << 20
SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weights file of a source: its name, size in bytes, metadata, and tensors in byte order."""

    name: str
    size: int
    metadata: dict[str, str]
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    file: int
    start: int
    spec: TensorSpec


class Checkpoint:
    """An open checkpoint folder: an open resource, to be closed or used in a `with`."""

    def __init__(self, folder: Path, revision: str = "", name: str = "") -> None:
        """Open the folder and check every header.  Raises CheckpointError."""
        self.folder = folder
        self.revision = revision
        self.name = name or folder.resolve().name
        self.config = read_config(folder)
        self.index, names = weight_files(folder)
        self._places: dict[str, _Place] = {}
        self._fds: list[int] = []
        self._names: list[str] = []
        self._stats: list[os.stat_result] = []
        self.files: tuple[SourceFile, ...] = ()
        try:
            self.files = tuple(self._add(name) for name in names)
            self._check_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        while self._fds:
            os.close(self._fds.pop())

    @property
    def model_type(self) -> str:
        """The config's `model_type`.  Raises CheckpointError where it has none."""
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise CheckpointError(f"{self.folder}/config.json: no model_type")
        return model_type

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, file by file, in the order its bytes lie."""
        return [place.spec for place in self._places.values()]

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes from `offset` on.  Raises SourceChanged."""
        place = self._places[name]
        at = place.start + offset
        while view:
            count = os.preadv(self._fds[place.file], [view], at)
            if count == 0:
                file = self.files[place.file].name
                raise SourceChanged(f"{self.folder / file}: became shorter while it was read")
            view, at = view[count:], at + count

    def check_unchanged(self) -> None:
        """Raise SourceChanged if a file was written to since it was opened."""
        for file, fd, before in zip(self.files, self._fds, self._stats, strict=True):
            now = os.fstat(fd)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise SourceChanged(f"{self.folder / file.name}: changed while it was read")

    def sample(self) -> str:
        """A digest of every header and of each tensor's first and last bytes.

        It tells checkpoints apart before they are read whole; it does not prove them equal.
        """
        digest = hashlib.sha256()
        for spec in self.specs():
            digest.update(strict_json.canonical([spec.name, spec.dtype, list(spec.shape)]))
            size = min(SAMPLE, spec.nbytes)
            for offset in sorted({0, spec.nbytes - size}):
                data = bytearray(size)
                self.read_into(spec.name, offset, memoryview(data))
                digest.update(data)
        return digest.hexdigest()

    def companions(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of each small file a model needs beside its weights; never code."""
        for path in sorted(self.folder.iterdir()):
            if path.suffix in COMPANIONS and not path.name.endswith(SUFFIX) and path.is_file():
                real = real_file(self.folder, path.name, CheckpointError)
                yield path.name, read_small(real, MAX_COMPANION, CheckpointError)

    def _add(self, name: str) -> SourceFile:
        path = real_file(self.folder, name, CheckpointError)
        if not path.exists():
            raise CheckpointError(f"{self.folder / name}: missing, though the index names it")
        found = header.read_header(path)
        self._fds.append(open_regular(path, CheckpointError))
        self._stats.append(os.fstat(self._fds[-1]))
        for entry in found.entries:
            tensor = entry.spec.name
            if tensor in self._places:
                other = self._names[self._places[tensor].file]
                raise CheckpointError(f"{path}: {tensor} is in {other} as well")
            self._places[tensor] = _Place(len(self._fds) - 1, entry.start, entry.spec)
        self._names.append(name)
        tensors = tuple(entry.spec.name for entry in found.entries)
        return SourceFile(name, self._stats[-1].st_size, found.metadata, tensors)

    def _check_index(self) -> None:
        if self.index is None:
            return
        where = self.folder / self.index.name
        actual = {tensor: file.name for file in self.files for tensor in file.tensors}
        for tensor, file in self.index.weight_map.items():
            if actual.get(tensor) != file:
                found = actual.get(tensor, "no file")
                raise CheckpointError(f"{where}: says {tensor} is in {file}, but it is in {found}")
        if extra := sorted(actual.keys() - self.index.weight_map.keys()):
            raise CheckpointError(
                f"{where}: does not name {extra[0]}, which is in {actual[extra[0]]}"
            )


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a Hub id through huggingface_hub's cache.  Raises CheckpointError."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source}: a folder has no revision; leave --revision out")
        return Checkpoint(folder)
    if folder.exists():
        raise CheckpointError(f"{source}: is a file; name the folder it is in")
    from shardkit.checkpoint.hub import download  # noqa: PLC0415  (costs 0.3 s)

    local, commit = download(source, revision)
    return Checkpoint(local, commit, source)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.  Raises CheckpointError."""
    path = real_file(folder, "config.json", CheckpointError)
    try:
        config = strict_json.parse(read_small(path, MAX_CONFIG, CheckpointError))
    except strict_json.JsonError as fault:
        raise CheckpointError(f"{folder}/config.json: {fault}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/config.json: is no object")
    return config


def weight_files(folder: Path) -> tuple[Index | None, list[str]]:
    """The index, if there is one, and the weights files.  Raises CheckpointError if in doubt."""
    names = sorted(path.name for path in folder.iterdir())
    indices = [name for name in names if name.endswith(SUFFIX)]
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder}: {len(indices)} indices, {' and '.join(indices)}; keep one"
        )
    if indices:
        index = read_index(folder, indices[0])
        files = sorted(set(index.weight_map.values()))
        if SINGLE in weights and SINGLE not in files:
            raise CheckpointError(
                f"{folder}: has both {SINGLE} and {indices[0]}, which does not name it; remove one"
            )
        return index, files
    if SINGLE in weights or len(weights) == 1:
        return None, [SINGLE if SINGLE in weights else weights[0]]
    if weights:
        raise CheckpointError(f"{folder}: {len(weights)} safetensors files, and no *{SUFFIX}")
    if any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(
            f"{folder}: only pickled weights, which can run code; convert them to safetensors first"
        )
    raise CheckpointError(f"{folder}: no safetensors file")
