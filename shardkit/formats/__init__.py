"""Quantized formats, as data: which tensors store a weight, and how they follow its axes."""

from shardkit.formats.format import (
    Format,
    Scheme,
    StoredAxis,
    StoredTensor,
    list_formats,
)
from shardkit.formats.grouping import (
    Grouping,
    QuantizedWeight,
    find_plain_dtype,
    group_checkpoint,
    group_quantized,
    is_plain,
    list_weights,
)
from shardkit.formats.schemes import find_schemes, make_scheme

__all__ = [
    "Format",
    "Grouping",
    "QuantizedWeight",
    "Scheme",
    "StoredAxis",
    "StoredTensor",
    "find_plain_dtype",
    "find_schemes",
    "group_checkpoint",
    "group_quantized",
    "is_plain",
    "list_formats",
    "list_weights",
    "make_scheme",
]
