"""Shrinks any model's config by the names of its fields, so that a model of it is made at once.

Counts that a recipe must tell apart get different values, as far as one can tell from a name:
a draft finds the config field of a count by its value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

VOCAB = 211
FEW_TOKENS = 16  # of other vocabularies, such as types
HEADS = (8, 4)  # an encoder's and a decoder's differ, where they have fields of their own
KV_HEADS = 4
HEAD_DIM = 16
WIDTHS = (72, 40, 56, 32)  # of feed-forward layers, by field
LAYERS = 2
MOST_KINDS = 4
SMALL = {"experts": 4, "chosen": 2, "positions": 64, "window": 8, "rank": 24, "one": 1,
         "dense": 1}  # fmt: skip
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
SIDE = re.compile(r"encoder_|decoder_")
START = "decoder_start_token_id"
TOKEN = re.compile(r"\w*token_(?:id|index)s?|\w+_idx")


@dataclass(frozen=True)
class Way:
    """How to shrink: what is tried next where a model cannot be built or run so."""

    kv_heads: bool = True  # fewer than heads, as grouped-query attention has
    own_width: bool = True  # heads times head_dim need not be the model's width
    kinds: frozenset[str] = frozenset(KINDS)


@dataclass
class _Given:
    """What has been given to the fields of one table so far."""

    heads: Iterator[int]
    widths: Iterator[int]
    layers: tuple[int, int] | None = None
    by_field: dict[str, int] = field(default_factory=dict)


def ways() -> Iterator[Way]:
    """The ways to shrink, the one that shows most of a model first."""
    yield Way()
    yield Way(own_width=False)
    yield Way(kv_heads=False)
    yield Way(kv_heads=False, own_width=False)
    few = frozenset({"layers", "vocab", "positions", "heads", "hidden", "ffn", "experts"})
    yield Way(kv_heads=False, own_width=False, kinds=few)
    yield replace(Way(), kinds=frozenset({"layers", "vocab"}))


def shrunk(config: Mapping[str, Any], way: Way) -> dict[str, Any]:
    """The config with small numbers, nested tables too; what no pattern names stays as it is."""
    given = _Given(iter((*HEADS, *HEADS)), iter(WIDTHS))
    result = dict(config)
    for key, value in config.items():
        kind = "ffn" if key == "hidden_dim" and "dim" in config else kind_of(key)
        if isinstance(value, Mapping) and not key.endswith(("2label", "2id")):
            result[key] = _rope(value) if "rope" in key else shrunk(value, way)
        elif TOKEN.fullmatch(key):
            result[key] = _token(value)
        elif type(value) is int and value > 1 and kind in way.kinds:
            result[key] = _number(kind, key, value, config, given, way)
        elif value is None and (kind == "chosen" or (kind == "kv_heads" and way.kv_heads)):
            result[key] = SMALL["chosen"] if kind == "chosen" else KV_HEADS
    if config.get("is_encoder_decoder") and config.get(START) is None:
        result[START] = config.get("pad_token_id") or 0  # or nothing could be generated
    return _layered(config, result, given)


def kind_of(key: str) -> str:
    """Which kind of number a field is; empty for one that is left alone."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(key)), "")


def _number(
    kind: str, key: str, value: int, config: Mapping[str, Any], given: _Given, way: Way
) -> int:
    half = kind == "rope_dim" or value == config.get("qk_rope_head_dim")
    match kind:
        case "vocab":
            return min(value, VOCAB if key == "vocab_size" else FEW_TOKENS)
        case "layers":
            return _layers(key, value, config, given)
        case "heads" | "ffn":
            return _one_of(kind, key, given)
        case "kv_heads":
            return KV_HEADS if way.kv_heads else HEADS[0]
        case "hidden":
            return _hidden(config, way)
        case "rope_dim" | "head_dim" | "scalar":
            return HEAD_DIM // 2 if half else HEAD_DIM
        case _:
            return min(value, SMALL[kind])


def _layers(key: str, value: int, config: Mapping[str, Any], given: _Given) -> int:
    few = min(value, _kinds_of_layers(config, value))
    if key.startswith(("num_hidden", "n_layer", "num_layers")) or given.layers is None:
        given.layers = value, few
    return few


def _one_of(kind: str, key: str, given: _Given) -> int:
    """A value of a field's own; heads have one, but for an encoder's and a decoder's."""
    own = key if kind == "ffn" or SIDE.match(key) else kind
    if own not in given.by_field:
        numbers, otherwise = (
            (given.heads, HEADS[-1]) if kind == "heads" else (given.widths, WIDTHS[0])
        )
        given.by_field[own] = next(numbers, otherwise)
    return given.by_field[own]


def _hidden(config: Mapping[str, Any], way: Way) -> int:
    """Heads times head_dim, or another width where the config says that they are apart."""
    own = any(KINDS["head_dim"].fullmatch(key) and config[key] for key in config)
    if type(times := config.get("expand")) is int:  # heads times head_dim is the expanded width
        return HEADS[0] * HEAD_DIM // max(times, 1)
    return 96 if own and way.own_width else HEADS[0] * HEAD_DIM


def _kinds_of_layers(config: Mapping[str, Any], layers: int) -> int:
    """As many layers as show every kind that lists of one entry for each layer name."""
    found = [LAYERS]
    for value in config.values():
        if isinstance(value, list) and len(value) == layers:
            found.append(len(_first_of_each(value)))
    return min(max(found), MOST_KINDS)


def _layered(config: Mapping[str, Any], result: dict[str, Any], given: _Given) -> dict[str, Any]:
    """Cut lists that have an entry for each layer, so that every kind of layer is left."""
    if given.layers is None:
        return result
    layers, few = given.layers
    for key, value in config.items():
        if isinstance(value, list) and len(value) == layers and not TOKEN.fullmatch(key):
            kept = _first_of_each(value)
            result[key] = (kept + value)[:few]
    return result


def _first_of_each(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _token(value: Any) -> Any:
    """A token's id inside the small vocabulary; different ones stay different as far as it goes."""
    if isinstance(value, list):
        return [_token(item) for item in value]
    return value if type(value) is not int or value < VOCAB else 8 + value % (VOCAB - 8)


def _rope(table: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters, the sections of a head's width scaled to the small one."""
    result = dict(table)
    for key, value in table.items():
        if isinstance(value, list) and "section" in key and sum(value):
            half, rest = HEAD_DIM // 2, len(value) - 1
            parts = [max(1, v * half // sum(value)) for v in value]
            result[key] = [*parts[:rest], half - sum(parts[:rest])]
        elif type(value) is int and KINDS["positions"].fullmatch(key):
            result[key] = SMALL["positions"]
    return result
