"""What a config and the names of tensors say of a model's parts. Arithmetic only."""

from collections.abc import Iterable, Mapping
from typing import Any

from shardkit import config_fields as fields
from shardkit.checkpoint.config_check import group_layers
from shardkit.layout.style import ROW, Style
from shardkit.planning.layout_plan import Plan
from shardkit.planning.placement import Placement
from shardkit.planning.placement_table import PlacementGroup

MAX_COUNT = 1 << 32
TOWER_MODULES = fields.VISION_MODULES | fields.AUDIO_MODULES | fields.PROJECTORS
NO_GENERATION = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForImageClassification", "VisionModel", "VisionModelWithProjection",
)  # fmt: skip
GENERATES = ("ForConditionalGeneration",)
PREDICTS_TOKENS = ("ForMaskedLM", "HeadModel", "HeadsModel", "MTModel", "EncoderDecoderModel")
CAUSAL = "ForCausalLM"
BASE = "Model"  # what the name of a class without a head ends in

Path = list[str]  # a tensor's name, cut at its dots


def generates_text(plan: Plan, config: Mapping[str, Any]) -> bool:
    """Whether the model produces text; an encoder alone does not.

    Beside a tower, layers that are called an encoder's may be the text's that is generated.
    """
    if config.get("is_decoder") is True:
        return True
    paths = [group.path for group in list_groups(plan, ROW)]
    names = list_class_names(plan, config)
    if any(name.endswith(GENERATES) for name in names):
        return True
    if "is_decoder" not in config and any(name.endswith(CAUSAL) for name in names):
        return True  # whatever its list of layers is called
    if paths and all(is_encoder(path) for path in paths if not is_tower(path)):
        return False
    return not any(name.endswith(NO_GENERATION) for name in names)


def predicts_tokens(plan: Plan, config: Mapping[str, Any]) -> bool:
    """Whether the model ends in logits over the vocabulary, whatever they are used for."""
    names = list_class_names(plan, config)
    if any(name.endswith(PREDICTS_TOKENS) for name in names):
        return True
    return generates_text(plan, config) and not any(name.endswith(BASE) for name in names)


def list_class_names(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """The class of the plan, or if it has noted none, the names that a config states."""
    if plan.model_class:
        return [plan.model_class]
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def list_groups(plan: Plan, style: Style) -> list[PlacementGroup]:
    """The loaded tensors of a style that its collective is for: not a row-parallel layer's bias."""
    undivided_ok = style.divides == "nothing"
    return [
        group
        for group in plan.loaded_groups
        if group.layout.style is style and (group.layout.dim is not None or undivided_ok)
    ]


def list_placements(plan: Plan, style: Style) -> list[Placement]:
    """The same one by one."""
    return [p for group in list_groups(plan, style) for p in group.list_placements()]


def has_both_halves(paths: Iterable[Path]) -> bool:
    """Whether an encoder comes before a decoder, towers left aside."""
    text = [path for path in paths if not is_tower(path)]
    return any(map(is_encoder, text)) and any("decoder" in path for path in text)


def is_encoder(path: Path) -> bool:
    """Whether a module is of an encoder; a decoder may call its own list of layers one."""
    return "encoder" in path and "decoder" not in path[: path.index("encoder")]


def is_tower(path: Path) -> bool:
    """Whether a module runs once for each image or sound, and not for each token."""
    return not TOWER_MODULES.isdisjoint(path)


def is_of_tower(group: PlacementGroup) -> bool:
    """Whether tensors are of a tower, by their names or by what their rule divides."""
    by_units = any(unit.startswith(fields.TOWER_UNITS) for unit in group.layout.units)
    return by_units or is_tower(group.path)


def find_layer(path: Path) -> tuple[str, int] | None:
    """The list of layers a tensor is in, and the layer's number; None if it is in none."""
    ((name, layers),) = group_layers([".".join(path)]).items() or [("", {})]
    return (name, next(iter(layers))) if name else None


def count_repeats(config: Mapping[str, Any], module: str) -> int:
    """How many layers run a module that is stored once for several layers of a type."""
    lists = (config.get(name) for name in fields.LAYER_TYPES)
    types = next((types for types in lists if isinstance(types, list)), [])
    return types.count(fields.REPEATED_BLOCKS[module])


def select_text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config's language model, or of its decoder, nested or not."""
    tables = (config.get(name) for name in (fields.TEXT_TABLE, *fields.DECODER_TABLES))
    text = next((table for table in tables if isinstance(table, Mapping)), {})
    return {**config, **text}


def read_count(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The first of some fields that states a count; None if none does."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 1 <= value <= MAX_COUNT:
            return value
    return None


def find_field(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of some fields that a config has, and that is not null, false, 0 or empty."""
    return next((name for name in names if config.get(name)), None)
