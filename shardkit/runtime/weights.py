"""Reads a rank's file into tensors: own memory, in the file's order, hashed there if asked.

No memory map unless it is asked for: a shard that is truncated or changed while it is in use must
end in an error, or nowhere, but not in a crash or in other weights.
"""

import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from shardkit.dtypes import DTYPES
from shardkit.errors import ManifestError
from shardkit.files import ignore_progress
from shardkit.planning import Rank
from shardkit.runtime.huge_pages import PageChoice, advise_huge_pages
from shardkit.shards.integrity import READ_BYTES, RankReader, reuse_buffer, split_blocks
from shardkit.shards.manifest import Manifest
from shardkit.tensor import TensorSpec

_pages = PageChoice()  # of this process: what is faster here stays so
READS_AT_ONCE = 4  # of a large tensor: a disk answers several at once faster than in turn


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
    buffer = memoryview(bytearray(READ_BYTES if verify else 0))
    threads = 1 if verify else READS_AT_ONCE
    with RankReader(folder, manifest, rank, verify, threads) as reader:
        for spec in reader.specs:
            if spec.name in names:
                yield spec.name, read_new_tensor(reader, spec)
            elif verify:
                reader.read(spec, reuse_buffer(buffer, spec.nbytes, ignore_progress))
        reader.finish()


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
                yield spec.name, read_new_tensor(reader, spec)


def read_new_tensor(reader: RankReader, spec: TensorSpec) -> torch.Tensor:
    """A tensor of a rank's file in memory of its own. Raises ManifestError or VerifyError."""
    is_huge, start = _pages.choose(spec.nbytes), time.perf_counter()
    tensor, view = allocate_tensor(spec, is_huge)
    reader.read(spec, split_blocks(view))
    _pages.record(is_huge, len(view), time.perf_counter() - start)
    return tensor


def allocate_tensor(
    spec: TensorSpec, has_huge_pages: bool | None = None
) -> tuple[torch.Tensor, memoryview]:
    """An uninitialized tensor, and its bytes. Raises ManifestError for a dtype torch lacks.

    Unless it is said, it has huge pages if tensors that were read were faster with them.
    """
    dtype = require_torch_dtype(spec)
    flat = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
    if _pages.choose(spec.nbytes) if has_huge_pages is None else has_huge_pages:
        advise_huge_pages(flat)
    return flat.view(dtype).reshape(spec.shape), flat.numpy().data
