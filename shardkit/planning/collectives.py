"""What the ranks exchange for each token. Arithmetic only."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shardkit import config_fields as fields
from shardkit.layout.style import EXPERT, GATHER, NORM, RECURRENT, ROW, VOCAB
from shardkit.planning.layout_plan import Plan
from shardkit.planning.parts import (
    Path,
    count_repeats,
    find_layer,
    generates_text,
    has_both_halves,
    is_encoder,
    is_of_tower,
    is_tower,
    list_groups,
    list_placements,
    predicts_tokens,
    read_count,
    select_text_fields,
)
from shardkit.planning.placement import Placement
from shardkit.planning.placement_table import PlacementGroup
from shardkit.recipe import match_joint_sums
from shardkit.tensor import TensorSpec

OUTPUT_MODULES = (
    "lm_head", "embed_out", "decoder", "output", "output_projection", "lm_loss", "head", "cls",
    "unembed", "proj_out", "logits_dense",
)  # fmt: skip
# A module of its own, in the model as on disk.
ROUTED_EXPERT = re.compile(rf"{fields.EXPERT_PREFIX}\d+")
MATRICES_PER_CELL = 2  # of a recurrent cell: one for its input, one for its hidden state


@dataclass(frozen=True, slots=True)
class Collectives:
    """What the ranks exchange in one forward pass: one per generated token.

    Attributes:
        row_parallel: Sums after row-parallel weights, each as often as it is used.
        expert_stacks: Sums after stacks of experts.
        joint: How many of these are added to another first, so that one all-reduce serves both.
        embedding: All-reduces after vocab-parallel embeddings.
        output: All-gathers of a vocab-parallel output layer's logits.
        norms: All-reduces inside norms over a divided width.
        gathered: All-gathers for modules that run on their whole width, and for hidden states.
        encoder: All-reduces of an encoder or a tower, once per prompt.
        is_tied: Whether the output layer is the embedding's own weight.
        is_routed: Whether experts run one by one, with a sum for each that tokens are routed to:
            of such a stack, `expert_stacks` counts one.
    """

    row_parallel: int = 0
    expert_stacks: int = 0
    joint: int = 0
    embedding: int = 0
    output: int = 0
    norms: int = 0
    gathered: int = 0
    encoder: int = 0
    is_tied: bool = False
    is_routed: bool = False

    @property
    def all_reduces(self) -> int:
        """Sums over ranks."""
        sums = self.row_parallel + self.expert_stacks - self.joint
        return sums + self.embedding + self.norms

    @property
    def all_gathers(self) -> int:
        """Concatenations over ranks."""
        return self.output + self.gathered


def count_collectives(plan: Plan, config: Mapping[str, Any]) -> Collectives:
    """The collectives of one forward pass: one sum after each row-parallel weight, and the ends.

    A weight that several layers share is counted as often as it is used. A vocab-parallel embedding
    needs one sum, and a vocab-parallel output, stored or tied to the embedding, one gather.
    """
    if plan.tp_size == 1:
        return Collectives()
    text = select_text_fields(config)
    makes_text = generates_text(plan, config)
    rows, tower_rows = _part_towers(list_groups(plan, ROW), makes_text)
    norms, tower_norms = _part_towers(list_groups(plan, NORM), makes_text)
    experts = [group for group in plan.loaded_groups if group.layout.style is EXPERT]
    stacks, tower_stacks = map(_find_whole_stacks, _part_towers(experts, makes_text))
    dense, tower_dense = _list_dense_paths(rows), _list_dense_paths(tower_rows)
    expert_sums = _count_expert_sums(rows, config)
    encoder_sums = _count_encoder_sums(dense)
    encoder_stacks = sum(map(is_encoder, stacks)) if has_both_halves([*dense, *stacks]) else 0
    uses = _count_uses(text, dense)
    vocab = list_placements(plan, VOCAB)
    outputs = list_outputs(vocab)
    tables = [p.spec.name.split(".") for p in vocab if p not in outputs]
    both, reads_ids = has_both_halves(dense), text.get(fields.FEATURES_READ) is None
    has_output = bool(vocab) and (bool(outputs) or predicts_tokens(plan, config))
    recurrent = sum(len(p.spec.shape) > 1 for p in list_placements(plan, RECURRENT))
    return Collectives(
        row_parallel=int((len(dense) - encoder_sums + _count_repeats(dense, text)) * uses),
        expert_stacks=sum(expert_sums.values()) + len(stacks) - encoder_stacks,
        joint=int(_count_joint_sums(plan, dense, expert_sums, stacks) * uses),
        embedding=(min(len(tables), 1) if both else len(tables)) + _count_more_lookups(text),
        output=int(has_output),
        norms=sum(group.count for group in norms),
        gathered=len({_find_module(p.spec) for p in list_placements(plan, GATHER)})
        + recurrent // MATRICES_PER_CELL,
        encoder=_count_encoder_uses(encoder_sums, text)
        + len(tower_dense)
        + sum(_count_expert_sums(tower_rows, config).values())
        + encoder_stacks
        + len(tower_stacks)
        + sum(group.count for group in tower_norms)
        + int(both and reads_ids and any("decoder" not in path for path in tables))
        + int(config.get(fields.EMBEDDED_TWICE) is not None),
        is_tied=has_output and not any(len(p.spec.shape) > 1 for p in outputs),
        is_routed=any(ROUTED_EXPERT.fullmatch(word) for group in rows for word in group.path),
    )


def _count_encoder_uses(sums: int, config: Mapping[str, Any]) -> int:
    """The sums of an encoder that passes its global tokens through each layer as well."""
    return sums * (2 if config.get(fields.GLOBAL_TOKENS) is not None else 1)


def _count_uses(config: Mapping[str, Any], paths: list[Path]) -> Fraction:
    """How often a token passes through each stored layer, on average over stacks of layers."""
    layers, groups = read_count(config, fields.LAYERS), read_count(config, fields.LAYER_GROUPS)
    if stack := read_count(config, fields.LAYERS_PER_STACK):
        groups = stack * len({layer[0] for path in paths if (layer := find_layer(path))})
    passes = Fraction(layers, groups) if layers and groups else Fraction(1)
    return passes * (2 if config.get(fields.TWO_STREAMS) is not None else 1)


def _count_repeats(paths: list[Path], config: Mapping[str, Any]) -> Fraction:
    """The uses after the first of what is stored once for several layers of a type."""
    repeats = Fraction(0)
    for module in fields.REPEATED_BLOCKS:
        inside = [path for path in paths if module in path]
        if stored := len({find_layer(path) for path in inside}):
            repeats += len(inside) * (Fraction(count_repeats(config, module), stored) - 1)
    return repeats


def _count_more_lookups(config: Mapping[str, Any]) -> int:
    """The lookups in a table of hashes after the first: one for each length of a group of bytes."""
    lengths = config.get(fields.HASHED_LENGTHS)
    functions = read_count(config, fields.HASH_FUNCTIONS) or 1
    return functions * len(lengths) - 1 if isinstance(lengths, list) and lengths else 0


def _count_joint_sums(
    plan: Plan, dense: list[Path], expert_sums: Mapping[str, int], stacks: list[Path]
) -> int:
    """How many sums are added to another one first: of those of a layer that are made together."""
    if not plan.joint_sums:
        return 0
    once = [stack for stack, count in expert_sums.items() if count == 1]
    experts = (f"{stack}.{fields.EXPERTS_MODULE}".removeprefix(".") for stack in once)
    paths = [*map(".".join, [*dense, *stacks]), *experts]
    return sum(len(names) - 1 for _, _, names in match_joint_sums(plan.joint_sums, paths))


def _count_expert_sums(rows: list[PlacementGroup], config: Mapping[str, Any]) -> dict[str, int]:
    """For each stack of experts its sums: one, or one for each expert that a token uses.

    The experts of a stack that is a single matrix run one by one, through one module.
    """
    top_k = read_experts_per_token(config) or 1
    sums: dict[str, int] = {}
    for group in rows:
        if fields.EXPERTS_MODULE in group.path:
            sections, is_flat = group.layout.sections, len(group.tensors.shape) == 2
            count = top_k if is_flat and any(s.repeat > 1 for s in sections) else 1
            stacks = {
                f".{name}".partition(f".{fields.EXPERTS_MODULE}.")[0]
                for name in group.tensors.names
            }
            sums |= dict.fromkeys(stacks, count)
    return sums


def _find_whole_stacks(experts: list[PlacementGroup]) -> list[Path]:
    """The modules around stacks of which each rank has whole experts, and sums once.

    Each tensor of a stack may be that of a module of its own.
    """
    modules: dict[tuple[str, ...], Path] = {}  # by what they are in
    for group in experts:
        expert = group.layout.expert
        for name in group.tensors.names if expert is None or expert.number == 0 else ():
            path = name.split(".")
            end = len(path) - 1 - (path[-1] in ("weight", "bias"))
            if expert is not None:
                end = max(at for at, word in enumerate(path) if word in expert.module_names)
            modules.setdefault(tuple(path[: end - 1]), path[:end])
    return [*modules.values()]


def read_experts_per_token(config: Mapping[str, Any]) -> int | None:
    """How many experts of a layer a token is routed to, as a config states it anywhere."""
    tables: Iterator[Mapping[str, Any]] = (t for t in config.values() if isinstance(t, Mapping))
    counts = (read_count(table, fields.EXPERTS_PER_TOKEN) for table in (config, *tables))
    return next((count for count in counts if count), None)


def _part_towers(
    groups: list[PlacementGroup], makes_text: bool
) -> tuple[list[PlacementGroup], list[PlacementGroup]]:
    """These tensors without those of towers, and those; without text, there are no towers."""
    parts: tuple[list[PlacementGroup], list[PlacementGroup]] = [], []
    for group in groups:
        parts[makes_text and is_of_tower(group)].append(group)
    return parts


def _list_dense_paths(rows: list[PlacementGroup]) -> list[Path]:
    dense = (group.tensors.names for group in rows if fields.EXPERTS_MODULE not in group.path)
    return [name.split(".") for names in dense for name in names]


def _count_encoder_sums(paths: list[Path]) -> int:
    """Of the row-parallel layers at these paths, those of an encoder before a decoder."""
    text = [path for path in paths if not is_tower(path)]
    return sum(map(is_encoder, text)) if has_both_halves(paths) else 0


def list_outputs(vocab: list[Placement]) -> list[Placement]:
    """Of vocab-parallel tensors, those of an output layer: named as one, or with a bias."""
    modules = {p.spec.name: _find_module(p.spec) for p in vocab}
    biased = {modules[p.spec.name] for p in vocab if len(p.spec.shape) == 1}
    return [
        p
        for p in vocab
        if (module := modules[p.spec.name]) in biased or module.rpartition(".")[2] in OUTPUT_MODULES
    ]


def _find_module(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight").removesuffix(".bias")
