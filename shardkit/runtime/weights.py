"""Reads a rank's file into tensors: own memory, in the file's order, hashed there if asked.

No memory map: a shard that is truncated or changed while it is in use must end in an error, or
nowhere, but not in a crash or in other weights.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from shardkit.errors import ManifestError
from shardkit.shards.integrity import BLOCK, RankReader, reuse_buffer, split_blocks
from shardkit.shards.manifest import Manifest
from shardkit.tensor import TensorSpec

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def read_tensors(
    folder: Path, manifest: Manifest, tp_rank: int, names: Collection[str], verify: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of these names in a rank's file, on the CPU, in the order they lie there.

    With `verify` every byte of the file is hashed as it is read; a tensor comes once its mark is
    right, and the iterator ends without an error once the file's sha256 is.  Raises ManifestError
    or VerifyError.
    """
    buffer = memoryview(bytearray(BLOCK if verify else 0))
    with RankReader(folder, manifest, tp_rank, verify) as reader:
        for spec in reader.specs:
            if spec.name in names:
                tensor, view = _allocate_tensor(spec)
                reader.read(spec, split_blocks(view))
                yield spec.name, tensor
            elif verify:
                reader.read(spec, reuse_buffer(buffer, spec.nbytes, lambda _: None))
        reader.finish()


def _allocate_tensor(spec: TensorSpec) -> tuple[torch.Tensor, memoryview]:
    """An uninitialised tensor, and its bytes.  Raises ManifestError for a dtype torch lacks."""
    if spec.dtype not in TORCH_DTYPES:
        raise ManifestError(f"{spec.name}: torch has no dtype that holds {spec.dtype}")
    flat = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
    return flat.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape), flat.numpy().data
