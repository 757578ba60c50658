"""Reads a rank's file into tensors: own memory, in the file's order, hashed there if asked.

No memory map unless it is asked for: a shard that is truncated or changed while it is in use must
end in an error, or nowhere, but not in a crash or in other weights.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from shardkit.dtypes import DTYPES
from shardkit.errors import ManifestError
from shardkit.files import ignore_progress
from shardkit.planning import Rank
from shardkit.runtime.distributed.cores import count_rank_cores
from shardkit.runtime.first_touch import FirstTouch
from shardkit.shards.integrity import READ_BYTES, RankReader, reuse_buffer
from shardkit.shards.manifest import Manifest
from shardkit.tensor import TensorSpec

_first_touch = FirstTouch()  # of this process: what was faster is so for the next tensor, too
MAX_THREADS = 4  # that read at once, if the rank has cores for them: new memory takes longest
READ_TOGETHER = 64 << 20  # bytes of small tensors: a disk answers one large read faster


def find_torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors dtype; None if torch has none."""
    torch_name = DTYPES[name].torch_name
    dtype: torch.dtype | None = getattr(torch, torch_name) if torch_name else None
    return dtype


def require_torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a tensor. Raises ManifestError if torch has none."""
    dtype = find_torch_dtype(spec.dtype)
    if dtype is None:
        raise ManifestError(f"{spec.name}: torch has no dtype that holds {spec.dtype}")
    return dtype


def read_tensors(
    folder: Path, manifest: Manifest, rank: Rank, names: Collection[str], verify: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of these names in a rank's file, on the CPU, in the order they lie there.

    With `verify` every byte of the file is hashed as it is read; a tensor comes once its digest is
    right, and the iterator ends without an error once the file's sha256 is. Raises ManifestError
    or VerifyError.
    """
    if verify:
        yield from _read_hashed(folder, manifest, rank, names)
        return
    threads = min(MAX_THREADS, count_rank_cores())
    with RankReader(folder, manifest, rank, check_sha256=False, threads=threads) as reader:
        # What is computed of quantized weights takes memory, too: none is read ahead of them.
        together = 1 if manifest.plan.grouping.weights else READ_TOGETHER
        for batch in batch_specs(reader.specs, names, together):
            tensors = deque(read_new_tensors(reader, batch))
            for spec in batch:  # which is let go of once it is taken
                yield spec.name, tensors.popleft()


def _read_hashed(
    folder: Path, manifest: Manifest, rank: Rank, names: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    buffer = memoryview(bytearray(READ_BYTES))
    with RankReader(folder, manifest, rank) as reader:
        for spec in reader.specs:
            if spec.name in names:
                yield spec.name, read_new_tensors(reader, [spec])[0]
            else:
                reader.read(spec, reuse_buffer(buffer, spec.nbytes, ignore_progress))
        reader.finish()


def batch_specs(
    specs: Iterable[TensorSpec], names: Collection[str], together: int
) -> Iterator[list[TensorSpec]]:
    """The tensors of these names, in batches that are read together.

    A batch follows in the file without a gap, and ends once it has `together` bytes.
    """
    batch: list[TensorSpec] = []
    nbytes = 0
    for spec in specs:
        if is_named := spec.name in names:
            batch.append(spec)
            nbytes += spec.nbytes
        if batch and (not is_named or nbytes >= together):
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def map_tensors(
    folder: Path, manifest: Manifest, rank: Rank, names: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `read_tensors`, but tensors are the file itself, read when they are first used.

    What is written to one stays in this process. If the file is changed while one is in use, it
    changes, too; if the file is cut shorter, the process ends with SIGBUS. A tensor that the file
    holds at no multiple of its dtype's size is read.
    """
    with RankReader(folder, manifest, rank, check_sha256=False) as reader:
        memory = reader.map_memory()
        for spec in reader.specs:
            if spec.name not in names:
                continue
            dtype, offset = require_torch_dtype(spec), reader.offset(spec)
            if spec.nbytes and offset % dtype.itemsize == 0:
                flat = torch.frombuffer(memory, dtype=torch.uint8, count=spec.nbytes, offset=offset)
                yield spec.name, flat.view(dtype).reshape(spec.shape)
            else:
                yield spec.name, read_new_tensors(reader, [spec])[0]


def read_new_tensors(reader: RankReader, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Tensors that follow each other in a rank's file, each in memory of its own.

    Raises ManifestError or VerifyError.
    """
    allocated = [allocate_tensor(spec) for spec in specs]
    nbytes = sum(spec.nbytes for spec in specs)
    if reader.is_cached(specs[0], nbytes):  # else it is touched while a disk is waited for
        for tensor, _ in allocated:
            _first_touch.touch_memory(tensor, touches_usual=reader.threads == 1)
    reader.read(specs[0], [view for _, view in allocated])
    return [tensor for tensor, _ in allocated]


def allocate_tensor(spec: TensorSpec) -> tuple[torch.Tensor, memoryview]:
    """An uninitialized tensor, and its bytes. Raises ManifestError for a dtype torch lacks."""
    dtype = require_torch_dtype(spec)
    flat = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
    return flat.view(dtype).reshape(spec.shape), flat.numpy().data
