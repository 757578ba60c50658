"""Integers only: what a rank holds of an axis, and what a style means."""

from shardkit.layout.axis import Term, Unit, parse_axis, resolve_sections
from shardkit.layout.spans import (
    Cover,
    KvHeadMode,
    Section,
    Span,
    Tile,
    choose_block,
    cover_axis,
    cover_spans,
    kv_head_mode,
    num_indices,
    partition,
    rank_spans,
)
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
