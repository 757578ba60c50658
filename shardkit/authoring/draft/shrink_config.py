"""Shrinks any model's config by the names of its fields, so that a model of it is built at once.

Counts that a recipe must distinguish get different values as far as the fields' names allow: a
draft finds the config field of a count by its value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VOCAB = 211
TYPE_VOCAB = 16  # of other vocabularies, such as token types
HEADS = (8, 4)  # an encoder's and a decoder's differ if they have fields of their own
KV_HEADS = 4
HEAD_DIM = 16
WIDTHS = (72, 40, 56, 32)  # of feed-forward layers, by field
LAYERS = 2
MAX_LAYERS = 4
LIMITS = {
    "experts": 4,
    "chosen": 2,
    "positions": 64,
    "window": 8,
    "rank": 24,
    "one": 1,
    "dense": 1,
}
FIELDS = {
    "kv_heads": r"(?:\w+_)?(?:num_key_value_heads|num_kv_heads|n_head_kv|n_kv_heads)",
    "rope_dim": r"(?:\w+_)?(?:rope_head_dim|rotary_dim)",
    "head_dim": r"(?:\w+_)?(?:head_dim|d_kv|d_head|kv_channels|attention_head_size|qk_head_dim)",
    "heads": r"(?:\w+_)?(?:num_attention_heads|attention_heads|n_heads?|num_heads)",
    "layers": r"(?:\w+_)?(?:num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks)",
    "vocab": r"(?:\w+_)?vocab_size",
    "chosen": r"(?:\w+_)?(?:experts_per_tok(?:en)?|top_?k|moe_k)",
    "one": r"(?:\w+_)?(?:n_group|topk_group|n_shared_experts|num_shared_experts)",
    "experts": r"(?:\w+_)?experts",
    "dense": r"first_k_dense_replace",
    "positions": r"(?:\w+_)?(?:\w*position_embeddings|n_positions|n_ctx|max_seq_len|\w+_positions)",
    "window": r"(?:\w+_)?(?:sliding_window|attention_window|window_size|attention_chunk_size)",
    "rank": r"(?:\w+_)?lora_rank",
    "ffn": r"(?:\w+_)?(?:intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|mlp_dim"
    r"|feed_forward_size|ffn_size|ffn_dim_multiplier_size)",
    "scalar": r"query_pre_attn_scalar",
    "hidden": r"(?:\w+_)?(?:hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size"
    r"|embedding_dim|embed_proj_dim|model_dim|emb_dim)|dim",
}
KINDS = {name: re.compile(pattern) for name, pattern in FIELDS.items()}
SIDE_PREFIX = re.compile(r"encoder_|decoder_")
START_TOKEN = "decoder_start_token_id"
TOKEN_FIELD = re.compile(r"\w*token_(?:id|index)s?|\w+_idx")


@dataclass(frozen=True)
class ShrinkStrategy:
    """One way to shrink a config; if no model of the result can be built and run, try the next.

    Attributes:
        fewer_kv_heads: Whether there are fewer kv heads than heads, as in grouped-query attention.
        independent_width: Whether the hidden size may differ from heads times head_dim.
        kinds: The kinds of fields that are made small.
    """

    fewer_kv_heads: bool = True
    independent_width: bool = True
    kinds: frozenset[str] = frozenset(KINDS)


@dataclass
class _Assigned:
    """The values that the fields of one table have been given so far."""

    heads: Iterator[int]
    widths: Iterator[int]
    layers: tuple[int, int] | None = None  # before and after
    by_field: dict[str, int] = field(default_factory=dict)


def list_strategies() -> Iterator[ShrinkStrategy]:
    """The strategies to try, the one that keeps most of a model's structure first."""
    yield ShrinkStrategy()
    yield ShrinkStrategy(independent_width=False)
    yield ShrinkStrategy(fewer_kv_heads=False)
    yield ShrinkStrategy(fewer_kv_heads=False, independent_width=False)
    basic = frozenset({"layers", "vocab", "positions", "heads", "hidden", "ffn", "experts"})
    yield ShrinkStrategy(fewer_kv_heads=False, independent_width=False, kinds=basic)
    yield ShrinkStrategy(kinds=frozenset({"layers", "vocab"}))


def shrink_config(config: Mapping[str, Any], strategy: ShrinkStrategy) -> dict[str, Any]:
    """The config with small numbers, nested tables too; a field that no pattern names stays."""
    assigned = _Assigned(iter((*HEADS, *HEADS)), iter(WIDTHS))
    result = dict(config)
    for key, value in config.items():
        if not isinstance(key, str):
            continue  # a table by number, not of fields
        kind = "ffn" if key == "hidden_dim" and "dim" in config else field_kind(key)
        if isinstance(value, Mapping) and not key.endswith(("2label", "2id")):
            result[key] = _shrink_rope(value) if "rope" in key else shrink_config(value, strategy)
        elif TOKEN_FIELD.fullmatch(key):
            result[key] = _shrink_token(value)
        elif type(value) is int and value > 1 and kind in strategy.kinds:
            result[key] = _shrink_number(kind, key, value, config, assigned, strategy)
        elif value is None and kind == "chosen":
            result[key] = LIMITS["chosen"]
        elif value is None and kind == "kv_heads" and strategy.fewer_kv_heads:
            result[key] = KV_HEADS
    if config.get("is_encoder_decoder") and config.get(START_TOKEN) is None:
        result[START_TOKEN] = config.get("pad_token_id") or 0  # without one, it cannot generate
    return _cut_layer_lists(config, result, assigned)


def field_kind(key: str) -> str:
    """The kind of number that a field holds; empty if it is left alone."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(key)), "")


def _shrink_number(
    kind: str,
    key: str,
    value: int,
    config: Mapping[str, Any],
    assigned: _Assigned,
    strategy: ShrinkStrategy,
) -> int:
    is_half = kind == "rope_dim" or value == config.get("qk_rope_head_dim")
    match kind:
        case "vocab":
            return min(value, VOCAB if key == "vocab_size" else TYPE_VOCAB)
        case "layers":
            return _shrink_layers(key, value, config, assigned)
        case "heads" | "ffn":
            return _assign_value(kind, key, assigned)
        case "kv_heads":
            return KV_HEADS if strategy.fewer_kv_heads else HEADS[0]
        case "hidden":
            return _hidden_size(config, strategy)
        case "rope_dim" | "head_dim" | "scalar":
            return HEAD_DIM // 2 if is_half else HEAD_DIM
        case _:
            return min(value, LIMITS[kind])


def _shrink_layers(key: str, value: int, config: Mapping[str, Any], assigned: _Assigned) -> int:
    layers = min(value, _needed_layers(config, value))
    if key.startswith(("num_hidden", "n_layer", "num_layers")) or assigned.layers is None:
        assigned.layers = value, layers
    return layers


def _assign_value(kind: str, key: str, assigned: _Assigned) -> int:
    """A value of the field's own; heads share one, but for an encoder's and a decoder's."""
    name = key if kind == "ffn" or SIDE_PREFIX.match(key) else kind
    if name not in assigned.by_field:
        is_heads = kind == "heads"
        values, default = (assigned.heads, HEADS[-1]) if is_heads else (assigned.widths, WIDTHS[0])
        assigned.by_field[name] = next(values, default)
    return assigned.by_field[name]


def _hidden_size(config: Mapping[str, Any], strategy: ShrinkStrategy) -> int:
    """Heads times head_dim, or another width if the config has a head_dim of its own."""
    has_head_dim = any(KINDS["head_dim"].fullmatch(key) and config[key] for key in config)
    if type(expand := config.get("expand")) is int:  # heads times head_dim is the expanded width
        return HEADS[0] * HEAD_DIM // max(expand, 1)
    return 96 if has_head_dim and strategy.independent_width else HEADS[0] * HEAD_DIM


def _needed_layers(config: Mapping[str, Any], layers: int) -> int:
    """As many layers as show every kind that a list with an entry for each layer names."""
    counts = [
        len(_distinct(value))
        for value in config.values()
        if isinstance(value, list) and len(value) == layers
    ]
    return min(max([LAYERS, *counts]), MAX_LAYERS)


def _cut_layer_lists(
    config: Mapping[str, Any], result: dict[str, Any], assigned: _Assigned
) -> dict[str, Any]:
    """Cut lists that have an entry for each layer so that a layer of every kind is left."""
    if assigned.layers is None:
        return result
    before, after = assigned.layers
    for key, value in config.items():
        if isinstance(value, list) and len(value) == before and not TOKEN_FIELD.fullmatch(key):
            result[key] = (_distinct(value) + value)[:after]
    return result


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The first of each of equal values; they may be of a kind that has no hash."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _shrink_token(value: Any) -> Any:
    """A token's id inside the small vocabulary; different ones stay different if they can."""
    if isinstance(value, list):
        return [_shrink_token(item) for item in value]
    return value if type(value) is not int or value < VOCAB else 8 + value % (VOCAB - 8)


def _shrink_rope(table: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters, the sections of a head's width scaled to the small one."""
    result = dict(table)
    for key, value in table.items():
        if isinstance(value, list) and "section" in key and sum(value):
            half, count = HEAD_DIM // 2, len(value) - 1
            sections = [max(1, size * half // sum(value)) for size in value]
            result[key] = [*sections[:count], half - sum(sections[:count])]
        elif type(value) is int and KINDS["positions"].fullmatch(key):
            result[key] = LIMITS["positions"]
    return result
