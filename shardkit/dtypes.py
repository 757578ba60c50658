"""Every dtype a checkpoint can hold, as one table.

Names and widths are those of the safetensors format (safetensors/src/tensor.rs).
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "complex", "int", "bool"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype of the safetensors format.

    Attributes:
        name: What safetensors calls it, `BF16`.
        bits: The bits of one value.
        kind: What its values are.
        torch_name: What torch calls it, `bfloat16`; empty if torch has no such dtype.
        is_compute: Whether models compute in it. The others only store values.
        nonfinite: What makes a number NaN or infinite, as two integers of its width: the bits to
            look at, and what they are then. None if every bit pattern is a finite number.
        float_bytes: The bytes of one number that `nonfinite` describes.
    """

    name: str
    bits: int
    kind: Kind
    torch_name: str = ""
    is_compute: bool = False
    nonfinite: tuple[int, int] | None = None
    float_bytes: int = 0


def _all_set(bits: int) -> tuple[int, int]:
    return bits, bits


# A float is NaN or infinite if all bits of its exponent are set, whatever its sign.
_F64, _F32 = _all_set(0x7FF0 << 48), _all_set(0x7F80 << 16)
_BF16, _F16 = _all_set(0x7F80), _all_set(0x7C00)
_FNUZ = (0xFF, 0x80)  # the negative zero, which those formats have not, is their only NaN

# Formats of 4 and 6 bits have neither NaN nor infinity; of the 8-bit ones only E5M2 has infinities
# (OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0 for E8M0; FNUZ: Noune et
# al. 2022). A C64 value is two F32 numbers, counted one by one.
_TABLE = (
    Dtype("F4", 4, "float"),
    Dtype("F6_E2M3", 6, "float"),
    Dtype("F6_E3M2", 6, "float"),
    Dtype("F8_E5M2", 8, "float", "float8_e5m2", False, _all_set(0x7C), 1),
    Dtype("F8_E4M3", 8, "float", "float8_e4m3fn", False, _all_set(0x7F), 1),
    Dtype("F8_E8M0", 8, "float", "float8_e8m0fnu", False, _all_set(0xFF), 1),
    Dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz", False, _FNUZ, 1),
    Dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz", False, _FNUZ, 1),
    Dtype("F16", 16, "float", "float16", True, _F16, 2),
    Dtype("BF16", 16, "float", "bfloat16", True, _BF16, 2),
    Dtype("F32", 32, "float", "float32", True, _F32, 4),
    Dtype("F64", 64, "float", "float64", True, _F64, 8),
    Dtype("C64", 64, "complex", "complex64", False, _F32, 4),
    Dtype("BOOL", 8, "bool", "bool"),
    Dtype("U8", 8, "int", "uint8"),
    Dtype("I8", 8, "int", "int8"),
    Dtype("U16", 16, "int", "uint16"),
    Dtype("I16", 16, "int", "int16"),
    Dtype("U32", 32, "int", "uint32"),
    Dtype("I32", 32, "int", "int32"),
    Dtype("U64", 64, "int", "uint64"),
    Dtype("I64", 64, "int", "int64"),
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in _TABLE if dtype.torch_name}


def torch_name(dtype: object) -> str:
    """What torch calls one of its dtypes, without the module: `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
