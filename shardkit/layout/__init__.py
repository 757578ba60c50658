"""Integers only: what a rank holds of an axis, and what a style means."""

from shardkit.layout.axis import Term, Unit, parse_axis, resolve_sections
from shardkit.layout.spans import (
    KvHeadMode,
    Section,
    Span,
    Tile,
    cover_axis,
    kv_head_mode,
    num_indices,
    partition,
    rank_spans,
)
from shardkit.layout.style import STYLES, Style

__all__ = [
    "STYLES",
    "KvHeadMode",
    "Section",
    "Span",
    "Style",
    "Term",
    "Tile",
    "Unit",
    "cover_axis",
    "kv_head_mode",
    "num_indices",
    "parse_axis",
    "partition",
    "rank_spans",
    "resolve_sections",
]
