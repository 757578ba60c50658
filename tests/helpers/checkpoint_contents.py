"""Two ways to lay the same tensors out in files, and what an opened checkpoint reads of them."""

import os

from shardkit.checkpoint import Checkpoint
from tests.helpers.raw_safetensors import (
    small_file,
)

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

SINGLE = "model.safetensors"

PAIR = {ONE: small_file("b", "a"), TWO: small_file("c")}

PAIR_MAP = {"c": TWO, "a": ONE, "b": ONE}


def read_tensor(checkpoint: Checkpoint, name: str) -> bytes:
    spec = next(spec for spec in checkpoint.specs() if spec.name == name)
    data = bytearray(spec.nbytes)
    checkpoint.read_into(name, 0, memoryview(data))
    return bytes(data)


def read_tensors(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {spec.name: read_tensor(checkpoint, spec.name) for spec in checkpoint.specs()}


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
