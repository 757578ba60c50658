"""Reads a rank's file into tensors: own memory, in the file's order, hashed there if asked.

No memory map: a shard that is truncated or changed while it is in use must end in an error, or
nowhere, but not in a crash or in other weights.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from shardkit.dtypes import DTYPES
from shardkit.errors import ManifestError
from shardkit.files import ignore_progress
from shardkit.planning import Rank
from shardkit.runtime.huge_pages import advise_huge_pages
from shardkit.shards.integrity import READ_BYTES, RankReader, reuse_buffer, split_blocks
from shardkit.shards.manifest import Manifest
from shardkit.tensor import TensorSpec


def find_torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors dtype; None if torch has none."""
    torch_name = DTYPES[name].torch_name
    dtype: torch.dtype | None = getattr(torch, torch_name) if torch_name else None
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
    with RankReader(folder, manifest, rank, verify) as reader:
        for spec in reader.specs:
            if spec.name in names:
                tensor, view = allocate_tensor(spec)
                reader.read(spec, split_blocks(view))
                yield spec.name, tensor
            elif verify:
                reader.read(spec, reuse_buffer(buffer, spec.nbytes, ignore_progress))
        reader.finish()


def allocate_tensor(spec: TensorSpec) -> tuple[torch.Tensor, memoryview]:
    """An uninitialized tensor, and its bytes. Raises ManifestError for a dtype torch lacks."""
    dtype = find_torch_dtype(spec.dtype)
    if dtype is None:
        raise ManifestError(f"{spec.name}: torch has no dtype that holds {spec.dtype}")
    flat = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
    advise_huge_pages(flat)
    return flat.view(dtype).reshape(spec.shape), flat.numpy().data
