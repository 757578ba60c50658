"""Quantized formats, as data: which tensors store a weight, and how they follow its axes."""

from shardkit.recipe.formats.format import (
    Format,
    Scheme,
    StoredAxis,
    StoredPart,
    list_formats,
)
from shardkit.recipe.formats.grouping import (
    find_plain_dtype,
    group_checkpoint,
    group_quantized,
    is_plain,
    list_weights,
)
from shardkit.recipe.formats.schemes import find_schemes, make_scheme
from shardkit.recipe.formats.weights import AlikeWeights, Grouping, QuantizedWeight, WeightKind

__all__ = [
    "AlikeWeights",
    "Format",
    "Grouping",
    "QuantizedWeight",
    "Scheme",
    "StoredAxis",
    "StoredPart",
    "WeightKind",
    "find_plain_dtype",
    "find_schemes",
    "group_checkpoint",
    "group_quantized",
    "is_plain",
    "list_formats",
    "list_weights",
    "make_scheme",
]
