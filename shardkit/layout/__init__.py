"""Integers only: what a rank holds of an axis, and what a style means."""

from shardkit.layout.axis import Term, Unit, parse_axis, resolve_sections
from shardkit.layout.spans import (
    KvHeadMode,
    Section,
    choose_block,
    kv_head_mode,
    partition,
    rank_spans,
)
from shardkit.layout.stretches import Cover, Span, Tile, cover_axis, cover_spans, num_indices
from shardkit.layout.style import STYLES, Style

__all__ = [
    "STYLES",
    "Cover",
    "KvHeadMode",
    "Section",
    "Span",
    "Style",
    "Term",
    "Tile",
    "Unit",
    "choose_block",
    "cover_axis",
    "cover_spans",
    "kv_head_mode",
    "num_indices",
    "parse_axis",
    "partition",
    "rank_spans",
    "resolve_sections",
]
