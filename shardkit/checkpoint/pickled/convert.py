"""Opens any source: if its weights are pickled, and that is allowed, it converts them first.

A sandboxed subprocess reads one file at a time, so that no more than about one file is in memory,
and none of the pickle's objects reach this process. It costs a copy of the weights on disk, in
TMPDIR, for as long as the checkpoint is open.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shardkit.checkpoint.checkpoint import (
    Checkpoint,
    find_folder,
    name_of_folder,
    open_checkpoint,
    read_companions,
)
from shardkit.checkpoint.hub_cache import check_blob, is_blob
from shardkit.checkpoint.index import Index, encode_index
from shardkit.checkpoint.weight_files import (
    MANIFEST_NAME,
    PICKLED,
    find_weight_files,
    list_names,
)
from shardkit.errors import CheckpointError, SourceChanged, UsageError
from shardkit.files import open_regular_file, resolve_file

MEMORY_PER_BYTE = 1.5  # of a pickled file; measured 1.4
PROCESS_BYTES = 300_000_000  # of the process that converts it, and has imported torch
MIN_BYTES_PER_SECOND = 5_000_000
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "SYSTEMROOT")  # no token of the user's


@contextmanager
def open_source(
    source: str | Path,
    revision: str | None = None,
    allow_pickle: bool = False,
    max_memory: int | None = None,
) -> Iterator[Checkpoint]:
    """An open checkpoint, whatever its weights are.

    Args:
        source: A folder, or a Hub id.
        revision: A branch, tag or commit of a Hub repository.
        allow_pickle: Whether pickled weights may be read if there are no safetensors.
        max_memory: Bytes that the process which converts them may take; None for any.

    Raises:
        CheckpointError: If it cannot be read, or is a shard folder.
        UsageError: If pickled weights take more memory than is allowed.
    """
    source = str(source)
    if (Path(source) / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"{source}: is a shard folder already; use `shardkit reshard` or `shardkit merge`"
        )
    if not allow_pickle:
        with open_checkpoint(source, revision) as checkpoint:
            yield checkpoint
        return
    folder, commit = find_folder(source, revision, pickled=True)
    index, files = find_weight_files(folder, list_names(folder), pickled=True)
    name = name_of_folder(folder) if not commit else source
    if not files[0].endswith(PICKLED):
        with Checkpoint(folder, commit, name).check_numbers() as checkpoint:
            yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="shardkit-unpickled-") as scratch:
        _check_memory(folder, files, max_memory)
        convert_checkpoint(folder, index, files, Path(scratch))
        with Checkpoint(Path(scratch), commit, name).check_numbers() as checkpoint:
            yield checkpoint


def convert_checkpoint(
    folder: Path, index: Index | None, files: Sequence[str], scratch: Path
) -> None:
    """Write the checkpoint in `folder` as safetensors into `scratch`. Raises CheckpointError."""
    real = {name: resolve_file(folder, name, CheckpointError) for name in files}
    _check_room(real.values(), scratch)
    for name, data in read_companions(folder):
        (scratch / name).write_bytes(data)
    for name, path in real.items():
        _convert_file(path, name, scratch / safetensors_name(name))
    if index is not None and index.weight_map:
        places = {tensor: safetensors_name(file) for tensor, file in index.weight_map.items()}
        (scratch / safetensors_name(index.name)).write_bytes(
            encode_index(Index(index.name, places, index.metadata), 0)
        )


def _check_memory(folder: Path, files: Sequence[str], max_memory: int | None) -> None:
    sizes = (resolve_file(folder, name, CheckpointError).stat().st_size for name in files)
    needed = PROCESS_BYTES + MEMORY_PER_BYTE * max(sizes)
    if max_memory is not None and needed > max_memory:
        megabytes = math.ceil(needed / 10**6)
        raise UsageError(
            f"{folder}: to convert its pickled weights takes {megabytes} MB of memory, and"
            f" {max_memory // 10**6} MB are allowed; allow it with --max-memory {megabytes}M"
        )


def safetensors_name(name: str) -> str:
    """What a pickled file, or an index of some, is called as safetensors."""
    stem, dot, rest = name.partition(PICKLED)
    return stem.replace("pytorch_model", "model", 1) + (".safetensors" if dot else "") + rest


def _convert_file(path: Path, name: str, out: Path) -> None:
    """Convert one file, which must stay as its checksums were found to be."""
    source = open_regular_file(path, CheckpointError)
    try:
        target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            before = os.fstat(source)
            if is_blob(path):
                check_blob(path, name, source, lambda _: None)
            _run_sandbox(source, target, path)
            now = os.fstat(source)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise SourceChanged(f"{path}: changed while it was read")
        finally:
            os.close(target)
    except OSError as failure:
        raise CheckpointError(f"{out}: {failure.strerror}") from None
    finally:
        os.close(source)


def _run_sandbox(source: int, target: int, path: Path) -> None:
    """Run the process that converts one file, and wait for it. Raises CheckpointError."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "shardkit.checkpoint.pickled.sandbox",
        f"{source}",
        f"{target}",
    ]
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    modules = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment |= {"PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            pass_fds=(source, target), env=environment, cwd="/", check=False,
            timeout=600 + os.fstat(source).st_size / MIN_BYTES_PER_SECOND,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{path}: took too long to unpickle") from None
    if done.returncode:
        reason = done.stdout.decode(errors="replace").strip()
        reason = reason or f"the process that unpickles it ended with {done.returncode}"
        raise CheckpointError(f"{path}: {reason}")


def _check_room(files: Iterable[Path], scratch: Path) -> None:
    try:
        needed = sum(path.stat().st_size for path in files)
    except OSError as failure:
        raise CheckpointError(f"{failure.filename}: {failure.strerror}") from None
    if (free := shutil.disk_usage(scratch).free) < needed * 1.01:
        raise CheckpointError(
            f"{scratch.parent}: converting pickled weights needs {needed * 1.01 / 1e9:.2f} GB, and"
            f" {free / 1e9:.2f} GB are free; name another folder in TMPDIR"
        )
