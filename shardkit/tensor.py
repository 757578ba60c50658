"""A tensor as a file's header describes it: name, dtype, shape, and the bytes they make."""

import math
from dataclasses import dataclass

from shardkit.dtypes import DTYPES
from shardkit.errors import LayoutError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor. Raises LayoutError if they do not end on a byte."""
        return count_bytes(math.prod(self.shape) * DTYPES[self.dtype].bits, self)


@dataclass(frozen=True, slots=True)
class ByteView:
    """A tensor's bytes around one of its dimensions: `[outer, axis, inner]`, `inner` in bytes."""

    outer: int
    axis: int
    inner: int

    @property
    def row(self) -> int:
        """The bytes of one outer index."""
        return self.axis * self.inner


def byte_view(spec: TensorSpec, dim: int | None) -> ByteView:
    """The tensor's bytes seen around `dim`; one undivided row if `dim` is None.

    Raises LayoutError if an index along `dim` is not a whole number of bytes (packed F4).
    """
    if dim is None:
        return ByteView(1, 1, spec.nbytes)
    bits = math.prod(spec.shape[dim + 1 :]) * DTYPES[spec.dtype].bits
    return ByteView(math.prod(spec.shape[:dim]), spec.shape[dim], count_bytes(bits, spec))


def count_bytes(bits: int, spec: TensorSpec) -> int:
    """`bits` in bytes. Raises LayoutError if they are not a whole number of bytes."""
    if bits % 8:
        raise LayoutError(f"{spec.name}: {bits} bits of {spec.dtype} do not end on a byte")
    return bits // 8
