"""A tensor as a file's header describes it: name, dtype, shape, and the bytes they make."""

import math
from dataclasses import dataclass

from shardkit.errors import LayoutError

# Bits per element, by the dtype names of the safetensors format (safetensors/src/tensor.rs).
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor.  Raises LayoutError where they are not whole."""
        return whole_bytes(math.prod(self.shape) * DTYPE_BITS[self.dtype], self)


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
    """The tensor's bytes seen around `dim`; one undivided row where `dim` is None.

    Raises LayoutError where an index along `dim` is not a whole number of bytes (packed F4).
    """
    if dim is None:
        return ByteView(1, 1, spec.nbytes)
    bits = math.prod(spec.shape[dim + 1 :]) * DTYPE_BITS[spec.dtype]
    return ByteView(math.prod(spec.shape[:dim]), spec.shape[dim], whole_bytes(bits, spec))


def whole_bytes(bits: int, spec: TensorSpec) -> int:
    """`bits` in bytes.  Raises LayoutError where they are not a whole number of bytes."""
    if bits % 8:
        raise LayoutError(f"{spec.name}: {bits} bits of {spec.dtype} do not end on a byte")
    return bits // 8
