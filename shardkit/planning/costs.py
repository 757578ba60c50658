"""What a plan costs for each token: the cache and the collectives. Arithmetic only.

If a config does not state a number, it is not guessed: the answer says what is missing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardkit import config_fields as fields
from shardkit.dtypes import BY_TORCH_NAME, DTYPES
from shardkit.layout.style import GATHER, NORM, RECURRENT, ROW, VOCAB, Style
from shardkit.planning.placement import Placement, Plan
from shardkit.tensor import TensorSpec

MAX_COUNT = 1 << 32
TOWER_MODULES = fields.VISION_MODULES | fields.AUDIO_MODULES | fields.PROJECTORS
# The units of recipes that have no shared one, and whose keys and values are one per unit.
HEAD_UNITS = ("groups", "decoder_heads", "heads")
OUTPUT_MODULES = (
    "lm_head", "embed_out", "decoder", "output", "output_projection", "lm_loss", "head"
)  # fmt: skip
NO_GENERATION = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForImageClassification", "VisionModel", "VisionModelWithProjection",
)  # fmt: skip
MATRICES_PER_CELL = 2  # of a recurrent cell: one for its input, one for its hidden state


@dataclass(frozen=True, slots=True)
class KvCache:
    """The keys and values kept for one token.

    Attributes:
        layers: The layers that keep them.
        head_dim: The values of one key.
        dtype: Their safetensors dtype.
        kv_heads: The kv heads of each rank, copies counted.
    """

    layers: int
    head_dim: int
    dtype: str
    kv_heads: tuple[int, ...]

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """The bytes each rank keeps for one token."""
        bytes_per_head = 2 * self.layers * self.head_dim * DTYPES[self.dtype].bits // 8
        return tuple(bytes_per_head * heads for heads in self.kv_heads)


@dataclass(frozen=True, slots=True)
class Collectives:
    """What the ranks exchange in one forward pass: one per generated token.

    Attributes:
        row_parallel: All-reduces after row-parallel weights.
        expert_stacks: All-reduces after stacks of experts.
        embedding: All-reduces after a vocab-parallel embedding.
        output: All-gathers of a vocab-parallel output layer's logits.
        norms: All-reduces inside norms over a divided width.
        gathered: All-gathers for modules that run on their whole width, and for hidden states.
        encoder: All-reduces of an encoder or a tower, once per prompt.
        is_tied: Whether the output layer is the embedding's own weight.
    """

    row_parallel: int = 0
    expert_stacks: int = 0
    embedding: int = 0
    output: int = 0
    norms: int = 0
    gathered: int = 0
    encoder: int = 0
    is_tied: bool = False

    @property
    def all_reduces(self) -> int:
        """Sums over ranks."""
        return self.row_parallel + self.expert_stacks + self.embedding + self.norms

    @property
    def all_gathers(self) -> int:
        """Concatenations over ranks."""
        return self.output + self.gathered


def generates_text(plan: Plan, config: Mapping[str, Any]) -> bool:
    """Whether the model produces text; an encoder alone does not."""
    if config.get("is_decoder") is True:
        return True
    paths = [p.spec.name.split(".") for p in _placements_of(plan, ROW)]
    if paths and all("encoder" in path for path in paths if not _is_tower(path)):
        return False
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return not any(isinstance(name, str) and name.endswith(NO_GENERATION) for name in names)


def estimate_kv_cache(plan: Plan, config: Mapping[str, Any]) -> KvCache | str:
    """What one token adds to the cache; or, in words, that there is none, or why it is unknown."""
    if not generates_text(plan, config):
        return "none: an encoder keeps no cache"
    text = config.get(fields.TEXT_TABLE)
    config = {**config, **text} if isinstance(text, Mapping) else config
    if (unusual := _find_unusual_field(config)) is not None:
        return f"unknown: config.json has {unusual}, so layers differ in what they cache"
    layers = _read_count(config, fields.DECODER_LAYERS + fields.LAYERS)
    head_dim = _find_head_dim(plan, config)
    dtype, kv_heads = find_compute_dtype(plan, config), _count_kv_heads(plan, config)
    if layers is None:
        return "unknown: config.json does not state the number of layers"
    if head_dim is None:
        return "unknown: config.json does not state the width of a head"
    if kv_heads is None:
        return "unknown: cannot tell which unit of the recipe counts the kv heads"
    if dtype is None:
        return "unknown: neither config.json nor the weights state a dtype that models compute in"
    return KvCache(layers, head_dim, dtype, kv_heads)


def find_compute_dtype(plan: Plan, config: Mapping[str, Any]) -> str | None:
    """The dtype the model runs in: the config's, or the one most weights are stored in."""
    for key in fields.DTYPE:
        stated = BY_TORCH_NAME.get(str(config.get(key)))
        if stated is not None and stated.is_compute:
            return stated.name
    stored = Counter(p.spec.dtype for p in plan.placements if p.is_loaded)
    most = max(stored, key=stored.__getitem__, default=None)
    return most if most is not None and DTYPES[most].is_compute else None


def count_collectives(plan: Plan, config: Mapping[str, Any]) -> Collectives:
    """The collectives of one forward pass: one sum after each row-parallel weight, and the ends.

    A stack of experts is counted once; a model that runs them one by one through one module sums
    once for each that is used. A vocab-parallel embedding needs one sum, and a vocab-parallel
    output, stored or tied to the embedding, one gather.
    """
    if plan.tp_size == 1:
        return Collectives()
    paths = [p.spec.name.split(".") for p in _placements_of(plan, ROW)]
    stacks = {tuple(path[: path.index("experts")]) for path in paths if "experts" in path}
    dense = [path for path in paths if "experts" not in path]
    makes_text = generates_text(plan, config)
    per_prompt = _count_encoder_sums(dense, makes_text)
    vocab = [p for p in plan.placements if p.style is VOCAB and p.is_loaded]
    outputs = [p for p in vocab if _is_output(p.spec)]
    has_output = bool(vocab) and (bool(outputs) or makes_text)
    has_embedding = len(vocab) > len(outputs)
    recurrent = sum(len(p.spec.shape) > 1 for p in _placements_of(plan, RECURRENT))
    return Collectives(
        row_parallel=len(dense) - per_prompt,
        expert_stacks=len(stacks),
        embedding=int(has_embedding),
        output=int(has_output),
        norms=len(_placements_of(plan, NORM)),
        gathered=len(_placements_of(plan, GATHER)) + recurrent // MATRICES_PER_CELL,
        encoder=per_prompt + int(has_embedding and _has_both_halves(dense)),
        is_tied=has_output and not any(len(p.spec.shape) > 1 for p in outputs),
    )


def _placements_of(plan: Plan, style: Style) -> list[Placement]:
    """The tensors of a style that its collective is for: not a row-parallel layer's bias."""
    replicated_ok = style.divides == "nothing"
    return [
        p
        for p in plan.placements
        if p.style is style and p.is_loaded and (p.dim is not None or replicated_ok)
    ]


def _count_encoder_sums(paths: list[list[str]], makes_text: bool) -> int:
    """Of the row-parallel layers at these paths, those that run once per prompt."""
    text = [path for path in paths if not _is_tower(path)]
    encoders = sum("encoder" in path for path in text) if _has_both_halves(paths) else 0
    return encoders + (len(paths) - len(text) if makes_text else 0)


def _has_both_halves(paths: list[list[str]]) -> bool:
    """Whether an encoder comes before a decoder, towers left aside."""
    text = [path for path in paths if not _is_tower(path)]
    return any("encoder" in path for path in text) and any("decoder" in path for path in text)


def _is_tower(path: list[str]) -> bool:
    """Whether a module runs once for each image or sound, and not for each token."""
    return not TOWER_MODULES.isdisjoint(path)


def _is_output(spec: TensorSpec) -> bool:
    module = spec.name.removesuffix(".weight").removesuffix(".bias")
    return len(spec.shape) == 1 or module.rpartition(".")[2] in OUTPUT_MODULES


def _count_kv_heads(plan: Plan, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Each rank's kv heads; a K and a V that are replicated are one head on every rank.

    A shared unit may be a set of several kv heads, if the config counts more of them.
    """
    replicated = {s.units for p in plan.placements for s in p.sections if s.replicated}
    if replicated:
        return (1,) * plan.mesh.world_size if replicated == {2} else None
    units = {name: unit for name, unit in plan.units.items() if unit.count is not None}
    shared = [name for name, unit in units.items() if unit.shared_by]
    names = shared or [name for name in HEAD_UNITS if name in units][:1]
    if len(names) != 1:
        return None
    sets = units[names[0]].count or 1
    kv_heads = _read_count(config, fields.KV_HEADS) if shared else None
    heads_per_set, rest = divmod(kv_heads or sets, sets)
    if rest:
        return None
    ranks = plan.mesh.ranks()
    return tuple(heads_per_set * plan.count_local_units(names[0], rank) for rank in ranks)


def _find_head_dim(plan: Plan, config: Mapping[str, Any]) -> int | None:
    """The width of a kv head: a shared unit's own length, or else what the config says."""
    shared = {s.size for p in plan.placements for s in p.sections if s.shared_by}
    if len(shared) == 1:
        return shared.pop()
    if (stated := _read_count(config, fields.HEAD_DIM)) is not None:
        return stated
    hidden = _read_count(config, fields.HIDDEN_SIZE + fields.OTHER_WIDTHS)
    heads = _read_count(config, fields.DECODER_HEADS + fields.HEADS)
    return hidden // heads if hidden and heads and hidden % heads == 0 else None


def _find_unusual_field(config: Mapping[str, Any]) -> str | None:
    types = config.get("layer_types")
    if isinstance(types, list) and any(kind not in fields.KV_LAYER_TYPES for kind in types):
        return "layer_types"
    return next((key for key in fields.NON_KV_STATE if config.get(key)), None)


def _read_count(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    for name in names:
        value = config.get(name)
        if type(value) is int and 1 <= value <= MAX_COUNT:
            return value
    return None
