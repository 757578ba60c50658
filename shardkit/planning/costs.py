"""What a plan costs for each token: the cache and the collectives.  Arithmetic only.

Where a config does not tell a number, it is not guessed: the answer says what is missing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardkit.planning.plan import Placement, Plan
from shardkit.tensor import DTYPE_BITS, TensorSpec

MAX_COUNT = 1 << 32

# The names under which configs keep what a cache is made of, the decoder's own first.
LAYERS = (
    "decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers"
)  # fmt: skip
HEAD_DIM = ("head_dim", "d_kv")
HIDDEN = ("hidden_size", "d_model", "n_embd", "n_embed", "dim")
HEADS = (
    "decoder_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads",
    "attention_heads",
)  # fmt: skip
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# The units of recipes that have no shared one, and whose keys and values are one per unit.
HEAD_UNITS = ("groups", "decoder_heads", "heads")
# A layer that is none of these keeps something other than keys and values.
CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
UNUSUAL = (
    "kv_lora_rank", "num_kv_shared_layers", "attn_layer_period", "attn_layer_indices",
    "hybrid_override_pattern", "layers_block_type", "ssm_cfg", "state_size", "mamba_d_state",
    "linear_num_key_heads", "lru_width", "block_types", "ssm_state_size", "conv_L_cache",
)  # fmt: skip
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
OUTPUT_MODULES = (
    "lm_head", "embed_out", "decoder", "output", "output_projection", "lm_loss", "head"
)  # fmt: skip
# Modules of a model of text that see: they run once for each image, not for each token.
VISION_MODULES = {"vision_tower", "vision_model", "visual", "multi_modal_projector", "connector"}
NO_GENERATION = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForImageClassification", "VisionModel", "VisionModelWithProjection",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KvCache:
    """The keys and values kept for one token; `kv_heads` are each rank's, copies counted."""

    layers: int
    head_dim: int
    dtype: str
    kv_heads: tuple[int, ...]

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """The bytes each rank keeps for one token."""
        each = 2 * self.layers * self.head_dim * DTYPE_BITS[self.dtype] // 8
        return tuple(each * heads for heads in self.kv_heads)


@dataclass(frozen=True, slots=True)
class Collectives:
    """What the ranks exchange in one forward pass: one per generated token.

    `encoder` counts the all-reduces of an encoder before a decoder, or of one that sees, made once
    per prompt.  `tied` says that the output layer is the embedding's own weight.
    """

    row_parallel: int = 0
    expert_stacks: int = 0
    embedding: int = 0
    output: int = 0
    norms: int = 0
    gathered: int = 0
    encoder: int = 0
    tied: bool = False

    @property
    def all_reduces(self) -> int:
        """Sums over ranks."""
        return self.row_parallel + self.expert_stacks + self.embedding + self.norms

    @property
    def all_gathers(self) -> int:
        """Concatenations over ranks: the logits, and inputs of modules that run whole."""
        return self.output + self.gathered


def generates_text(plan: Plan, config: Mapping[str, Any]) -> bool:
    """Whether the model produces text; an encoder alone does not."""
    if config.get("is_decoder") is True:
        return True
    layers = [p.spec.name.split(".") for p in _row_weights(plan)]
    if layers and all("encoder" in name for name in layers if not _is_vision(name)):
        return False
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return not any(isinstance(name, str) and name.endswith(NO_GENERATION) for name in names)


def estimate_kv_cache(plan: Plan, config: Mapping[str, Any]) -> KvCache | str:
    """What one token adds to the cache; or, in words, that there is none, or why it is unknown."""
    if not generates_text(plan, config):
        return "none: an encoder keeps no cache"
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    if (unusual := _find_unusual_field(config)) is not None:
        return f"unknown: config.json has {unusual}, so not every layer keeps keys and values alike"
    layers, head_dim = _read_count(config, LAYERS), _head_dim(plan, config)
    dtype, kv_heads = find_compute_dtype(plan, config), _local_kv_heads(plan, config)
    if layers is None:
        return "unknown: config.json does not tell the number of layers"
    if head_dim is None:
        return "unknown: config.json does not tell the width of a head"
    if kv_heads is None:
        return "unknown: the recipe does not tell which unit the kv heads are"
    if dtype is None:
        return "unknown: neither config.json nor the weights tell the dtype"
    return KvCache(layers, head_dim, dtype, kv_heads)


def find_compute_dtype(plan: Plan, config: Mapping[str, Any]) -> str | None:
    """The dtype the model runs in: the config's, or the one most weights are stored in."""
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := config.get(key), str) and name in DTYPES:
            return DTYPES[name]
    stored = Counter(p.spec.dtype for p in plan.placements if p.style != "ignore")
    most = max(stored, key=stored.__getitem__, default=None)
    return most if most in DTYPES.values() else None


def count_collectives(plan: Plan, config: Mapping[str, Any]) -> Collectives:
    """The collectives of one forward pass: one sum after each row-parallel weight, and the ends.

    A stack of experts is counted once; a model that runs them one by one through one module sums
    once for each that is used.  A vocab-parallel embedding needs one sum, and a
    vocab-parallel output, stored or tied to the embedding, one gather.
    """
    if plan.tp_size == 1:
        return Collectives()
    names = [p.spec.name.split(".") for p in _row_weights(plan)]
    stacks = {tuple(name[: name.index("experts")]) for name in names if "experts" in name}
    dense = [name for name in names if "experts" not in name]
    text = [name for name in dense if not _is_vision(name)]
    both = any("encoder" in n for n in text) and any("decoder" in n for n in text)
    before = sum("encoder" in name for name in text) if both else 0
    before += len(dense) - len(text) if generates_text(plan, config) else 0
    vocab = [p for p in plan.placements if p.style == "vocab"]
    outputs = [p for p in vocab if _is_output(p.spec)]
    stored = any(len(p.spec.shape) > 1 for p in outputs)
    output = bool(vocab) and (bool(outputs) or generates_text(plan, config))
    embedding = len(vocab) > len(outputs)
    return Collectives(
        row_parallel=len(dense) - before,
        expert_stacks=len(stacks),
        embedding=int(embedding),
        output=int(output),
        norms=sum(p.style == "norm" for p in plan.placements),
        gathered=sum(p.style == "gather" or _is_recurrent(p) for p in plan.placements),
        encoder=before + (both and embedding),
        tied=output and not stored,
    )


def _row_weights(plan: Plan) -> list[Placement]:
    return [p for p in plan.placements if p.style == "row" and p.dim is not None]


def _is_recurrent(placement: Placement) -> bool:
    """Whether it is one layer's and direction's weight in an LSTM, which gathers at every token."""
    leaf = placement.spec.name.rpartition(".")[2]
    return placement.style == "column" and leaf.startswith("weight_hh_l")


def _is_vision(name: list[str]) -> bool:
    return not VISION_MODULES.isdisjoint(name)


def _is_output(spec: TensorSpec) -> bool:
    module = spec.name.removesuffix(".weight").removesuffix(".bias")
    return len(spec.shape) == 1 or module.rpartition(".")[2] in OUTPUT_MODULES


def _local_kv_heads(plan: Plan, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Each rank's kv heads; a K and a V that stay whole are one head on every rank.

    A shared unit may be a set of several kv heads, where the config counts more of them.
    """
    whole = {s.units for p in plan.placements for s in p.sections if s.replicated}
    if whole:
        return (1,) * plan.tp_size if whole == {2} else None
    units = {name: unit for name, unit in plan.units.items() if unit.count is not None}
    shared = [name for name, unit in units.items() if unit.shared_by]
    names = shared or [name for name in HEAD_UNITS if name in units][:1]
    if len(names) != 1:
        return None
    sets = units[names[0]].count or 1
    each, rest = divmod((shared and _read_count(config, KV_HEADS)) or sets, sets)
    if rest:
        return None
    return tuple(
        each * plan.count_local_units(names[0], tp_rank) for tp_rank in range(plan.tp_size)
    )


def _head_dim(plan: Plan, config: Mapping[str, Any]) -> int | None:
    """The width of a kv head: a shared unit's own length, or else what the config says."""
    shared = {s.size for p in plan.placements for s in p.sections if s.shared_by}
    if len(shared) == 1:
        return shared.pop()
    if (stated := _read_count(config, HEAD_DIM)) is not None:
        return stated
    hidden, heads = _read_count(config, HIDDEN), _read_count(config, HEADS)
    return hidden // heads if hidden and heads and hidden % heads == 0 else None


def _find_unusual_field(config: Mapping[str, Any]) -> str | None:
    types = config.get("layer_types")
    if isinstance(types, list) and any(kind not in CACHED_LAYERS for kind in types):
        return "layer_types"
    return next((key for key in UNUSUAL if config.get(key)), None)


def _read_count(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    for name in names:
        value = config.get(name)
        if type(value) is int and 1 <= value <= MAX_COUNT:
            return value
    return None
