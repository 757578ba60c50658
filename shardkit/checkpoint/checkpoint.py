"""A checkpoint folder: one safetensors file, or several with an index."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from shardkit import strict_json
from shardkit.checkpoint import header
from shardkit.checkpoint.config import read_config
from shardkit.checkpoint.config_check import check_config, check_numbers
from shardkit.checkpoint.hub_cache import check_blob, check_bytes, is_blob
from shardkit.checkpoint.index import check_index
from shardkit.checkpoint.weight_files import (
    SINGLE,
    USUAL_INDEX,
    find_weight_files,
    is_companion,
    is_whole_set,
    list_names,
)
from shardkit.checkpoint.wrapper_names import find_wrapper_prefix
from shardkit.errors import CheckpointError, SourceChanged
from shardkit.files import (
    Progress,
    ShortRead,
    open_regular_file,
    read_exactly,
    read_small_file,
    resolve_file,
)
from shardkit.strict_json import quote
from shardkit.tensor import TensorTable

MAX_COMPANION = 256 << 20
FINGERPRINT_BYTES = 4096  # of each end of a tensor
MAX_THREADS = 8  # that hash a download, each with a buffer


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weights file of a source: its name, size in bytes, metadata, and tensors in byte order."""

    name: str
    size: int
    metadata: dict[str, str]
    tensors: tuple[str, ...]


class Checkpoint:
    """An open checkpoint folder: an open resource, to be closed or used in a `with`."""

    def __init__(self, folder: Path, revision: str = "", name: str = "") -> None:
        """Open the folder and check every header. Raises CheckpointError."""
        self.folder = folder
        self.revision = revision
        self.name = name or name_of_folder(folder)
        self.config = read_config(folder)
        self.index, names = find_weight_files(folder, list_names(folder))
        self._numbers: dict[str, int] = {}  # of the file that a tensor is in
        self._headers: list[header.Header] = []
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
        """The config's `model_type`. Raises CheckpointError if it has none."""
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise CheckpointError(f"{self.folder}/config.json: no model_type")
        return model_type

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong and does no harm, a line each."""
        if self.index is None:
            return ()
        where = self.folder / self.index.name
        if not self.has_true_index:
            what = "is of another build" if self.index.weight_map else "is not there"
            return (
                f"{where}: {what}, but the {len(self.files)} weights files are a whole set without"
                " it; they are taken, and a merge writes an index of them",
            )
        stated, total = self.index.total_size, self.specs().nbytes
        if stated in (None, 0, total):
            return ()
        return (
            f"{where}: total_size is {quote(stated)}, but the tensors are"
            f" {total} bytes; what is written has the true size",
        )

    @property
    def wrapper_prefix(self) -> str:
        """What training wrappers put before every tensor's name; empty if nothing."""
        return find_wrapper_prefix(list(self._numbers))

    @cached_property
    def has_true_index(self) -> bool:
        """Whether the index names each tensor in the file that has it, or none is needed."""
        if self.index is None:
            return True
        stated, files = self.index.weight_map, zip(self._names, self._headers, strict=True)
        return len(stated) == len(self._numbers) and all(
            [*map(stated.get, head.names)].count(name) == len(head.names) for name, head in files
        )

    @property
    def has_usual_files(self) -> bool:
        """Whether the files have the names, and the index, that transformers looks for."""
        if self.index is None:
            return self._names == [SINGLE]
        return self.index.name == USUAL_INDEX and self.has_true_index

    def check_numbers(self) -> "Checkpoint":
        """Return itself; close it and raise CheckpointError if the config is of no model at all."""
        try:
            check_numbers(self.config, self.specs(), self.folder)
        except BaseException:
            self.close()
            raise
        return self

    def check_config(self) -> None:
        """Raise CheckpointError if the config and the tensors do not agree.

        A recipe must be known first: of an unknown type nobody can tell what is missing.
        """
        check_config(self.config, self.specs(), self.folder)

    def specs(self) -> TensorTable:
        """Every tensor, file by file, in the order its bytes lie."""
        return self._table

    @cached_property
    def _table(self) -> TensorTable:
        kinds = chain.from_iterable(head.kinds for head in self._headers)
        return TensorTable.of_columns(list(self._numbers), kinds)

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes from `offset` on. Raises SourceChanged."""
        number = self._numbers[name]
        start = self._headers[number].places[name]
        path = self.folder / self.files[number].name
        try:
            read_exactly(self._fds[number], view, start + offset)
        except ShortRead:
            raise SourceChanged(f"{path}: became shorter while it was read") from None
        except OSError as failure:
            raise CheckpointError(f"{path}: cannot be read: {failure.strerror}") from None

    @property
    def download_bytes(self) -> int:
        """The bytes that `check_download` reads: of weights files in a Hub cache."""
        return sum(os.fstat(fd).st_size for _, _, fd in self._blobs())

    def check_download(self, progress: Progress) -> None:
        """Hash what lies in a Hub cache; raise CheckpointError if it is not the Hub's file."""
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            checks = [pool.submit(check_blob, *blob, progress) for blob in self._blobs()]
        for check in checks:
            check.result()

    def _blobs(self) -> list[tuple[Path, str, int]]:
        files = [
            (resolve_file(self.folder, name, CheckpointError), str(self.folder / name), fd)
            for name, fd in zip(self._names, self._fds, strict=True)
        ]
        return [file for file in files if is_blob(file[0])]

    def check_unchanged(self) -> None:
        """Raise SourceChanged if a file was written to since it was opened."""
        for file, fd, before in zip(self.files, self._fds, self._stats, strict=True):
            now = os.fstat(fd)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise SourceChanged(f"{self.folder / file.name}: changed while it was read")

    def digest_stats(self) -> str:
        """A digest of what tells whether a file was written to: sizes and times of change."""
        stats = [[stat.st_size, stat.st_mtime_ns] for stat in self._stats]
        return hashlib.sha256(strict_json.encode_canonical(stats)).hexdigest()

    def fingerprint(self) -> str:
        """A digest of every header and of each tensor's first and last bytes.

        It tells checkpoints apart before they are read whole; it does not prove them equal.
        """
        digest = hashlib.sha256()
        for spec in self.specs():
            digest.update(strict_json.encode_canonical([spec.name, spec.dtype, list(spec.shape)]))
            size = min(FINGERPRINT_BYTES, spec.nbytes)
            for offset in sorted({0, spec.nbytes - size}):
                data = bytearray(size)
                self.read_into(spec.name, offset, memoryview(data))
                digest.update(data)
        return digest.hexdigest()

    def companions(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of each small file a model needs beside its weights; never code."""
        return read_companions(self.folder)

    def count_companion_bytes(self) -> int:
        """The bytes of those files. None is read."""
        return sum(path.stat().st_size for _, path in list_companions(self.folder))

    def _add(self, name: str) -> SourceFile:
        path = resolve_file(self.folder, name, CheckpointError)
        self._fds.append(open_regular_file(path, CheckpointError))
        path = self.folder / name  # which the user knows, whatever it is a link to
        head = header.read_open_header(self._fds[-1], path)
        self._stats.append(os.fstat(self._fds[-1]))
        if tensor := next(iter(self._numbers.keys() & head.names), ""):
            raise CheckpointError(
                f"{path}: {quote(tensor)} is in {self._names[self._numbers[tensor]]} as well; the"
                " checkpoint is ambiguous"
            )
        self._numbers |= dict.fromkeys(head.names, len(self._names))
        self._headers.append(replace(head, raw=b""))
        self._names.append(name)
        return SourceFile(name, self._stats[-1].st_size, head.metadata, head.names)

    def _check_index(self) -> None:
        if self.index is not None and not self.has_true_index:
            is_whole = self._names == [SINGLE] or is_whole_set(self._names)
            files = {tensor: self._names[number] for tensor, number in self._numbers.items()}
            check_index(self.index, files, is_whole, self.folder)


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a Hub id through huggingface_hub's cache. Raises CheckpointError."""
    folder, commit = find_folder(source, revision)
    return Checkpoint(folder, commit, source if commit else "").check_numbers()


def find_folder(source: str, revision: str | None, pickled: bool = False) -> tuple[Path, str]:
    """The folder a source is in, and of a Hub id the commit. Raises CheckpointError.

    With `pickled`, a repository of nothing but pickled weights is one too.
    """
    folder = Path(source)
    if source and _ask_path(folder.is_dir):
        if revision is not None:
            raise CheckpointError(f"{source}: a folder has no revision; leave --revision out")
        return folder, ""
    if source and _ask_path(folder.exists):
        raise CheckpointError(f"{source}: is a file; name the folder it is in")
    from shardkit.checkpoint.hub import download_snapshot  # here, as it costs 0.3 s

    return download_snapshot(source, revision, pickled)


def name_of_folder(folder: Path) -> str:
    """A folder's own name, as text, even if its bytes are not: the manifest is text."""
    return os.fsencode(folder.resolve().name).decode(errors="backslashreplace")


def read_companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each small file a model needs beside its weights; never code."""
    for name, path in list_companions(folder):
        data = read_small_file(path, MAX_COMPANION, CheckpointError)
        if is_blob(path):
            check_bytes(path, str(folder / name), data)
        yield name, data


def list_companions(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and place of each of those files; a Hub cache keeps them elsewhere."""
    for name in list_names(folder):
        if is_companion(name) and (folder / name).is_file():
            yield name, resolve_file(folder, name, CheckpointError)


def _ask_path(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # too long for a path, or in a folder that may not be entered
        return False
