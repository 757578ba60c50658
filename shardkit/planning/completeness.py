"""Is anything missing that headers, config and recipe can tell: a weight, rows, an output layer?

What transformers loads without a missing key is never refused: layers may differ for many reasons,
so a weight is called missing only if the rest of its module, in this layer and all the others,
leaves no other.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardkit import config_fields as fields
from shardkit.layout.style import COLUMNS, ROW, VOCAB
from shardkit.planning.layer_kinds import LayerKinds, Layers, group_tensors
from shardkit.planning.layout_plan import Plan
from shardkit.planning.placement_table import PlacementGroup
from shardkit.recipe import Recipe, Rule
from shardkit.tensor import TensorTable

Config = Mapping[str, Any]

CERTAIN = 16  # layers of a kind: if one between the first and the last differs, it is damaged
HEAD_CLASSES = ("ForCausalLM", "LMHeadModel")  # their models have an output layer
OUTPUT_MODULES = ("lm_head", "embed_out", "output", "output_projection", "lm_loss", "proj_out")
FETCH = "fetch the weights again"


def find_empty_tensor(specs: TensorTable, recipe: Recipe, prefix: str) -> str:
    """A tensor without elements that a model would load, in words; empty if there is none.

    Args:
        specs: Every tensor.
        recipe: Their rules.
        prefix: What wrappers put before every name.
    """
    if not any(0 in spec.shape for spec in specs.examples):
        return ""
    for spec in specs:
        rules = recipe.rules_for(spec.name.removeprefix(prefix)) if 0 in spec.shape else ()
        if any(rule.style.is_loaded for rule in rules):
            return f"{spec.name} has the shape {list(spec.shape)}, without elements; {FETCH}"
    return ""


def find_missing(plan: Plan, recipe: Recipe, config: Config) -> str:
    """What a whole checkpoint would have besides, in words; empty if nothing can be told."""
    return (
        _find_missing_weight(plan, recipe, config)
        or _find_missing_rows(plan, config)
        or _find_missing_output(plan, recipe, config)
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that lacks what all others of its kind have: `missing` by their names within it."""

    name: str
    tensors: Mapping[str, PlacementGroup]
    missing: tuple[str, ...]
    is_certain: bool


def _find_missing_weight(plan: Plan, recipe: Recipe, config: Config) -> str:
    prefix, kinds = plan.wrapper_prefix, LayerKinds(config)
    for name, layers in group_tensors(plan.loaded_groups).items():
        for kind in kinds.group_layers(layers):
            if (layer := _find_odd_layer(name, kind)) is None:
                continue
            for rest in layer.missing:
                rules = recipe.rules_for(f"{layer.name}.{rest}".removeprefix(prefix))
                if layer.is_certain or (
                    rules and _is_needed(layer, rest, rules[0], recipe, prefix)
                ):
                    return (
                        f"{layer.name}.{rest} is not there, though each of the others like it in"
                        f" {name} has one; {FETCH}"
                    )
    return ""


def _find_odd_layer(name: str, layers: Layers) -> _Layer | None:
    """The one layer that lacks something and has nothing of its own, the others being equal."""
    count = len(layers)
    holders = Counter(rest for layer in layers.values() for rest in layer)
    shared = [rest for rest, number in holders.items() if number == count]
    partial = [rest for rest, number in holders.items() if number == count - 1]
    if not partial or any(1 < number < count - 1 for number in holders.values()):
        return None
    if any(len({layer[rest].tensors.shape for layer in layers.values()}) > 1 for rest in shared):
        return None
    odd = [at for at, layer in layers.items() if any(rest not in layer for rest in partial)]
    if len(odd) != 1 or any(holders[rest] == 1 for rest in layers[odd[0]] if count > 2):
        return None
    at = odd[0]
    certain = count >= CERTAIN and min(layers) < at < max(layers)
    return _Layer(f"{name}.{at}", layers[at], tuple(sorted(partial)), certain)


def _is_needed(layer: _Layer, rest: str, rule: Rule, recipe: Recipe, prefix: str) -> bool:
    """Whether no module runs as the layer's tensors beside the missing one would have it.

    Either one rule names it and all that is left of its parent's others (gate and up); or the
    parent has column-parallel weights whose row-parallel one it was, or the other way round. Two
    that one rule names (keys and values) may be absent together: another layer's are used.
    """
    if rule.style.divides == "nothing":
        return False
    parent = _find_parent(rest)

    def has_rule(name: str) -> bool:
        plain = f"{layer.name}.{name}".removeprefix(prefix)
        return _find_parent(name) == parent and rule in recipe.rules_for(plain)

    beside = {n: p for n, p in layer.tensors.items() if _find_parent(n) == parent}
    modules = {name.rpartition(".")[0] for name in layer.missing if has_rule(name)}
    if len(modules) == 1 and any(map(has_rule, beside)):
        return True
    styles = {group.layout.style for group in beside.values()}
    has_column, has_row = not styles.isdisjoint(COLUMNS), ROW in styles
    return (rule.style is ROW and has_column and not has_row) or (
        rule.style in COLUMNS and has_row and not has_column
    )


def _find_parent(name: str) -> str:
    """The module that holds a tensor's module."""
    return ".".join(name.split(".")[:-2])


def _find_missing_rows(plan: Plan, config: Config) -> str:
    """A vocabulary of another length than config.json has, which transformers does not load.

    Tables of other vocabularies may be beside it, so the config must be wrong of all of them.
    """
    text = config.get(fields.TEXT_TABLE)
    text = text if isinstance(text, Mapping) else config
    stated = next((text[key] for key in fields.VOCAB_SIZE if type(text.get(key)) is int), None)
    groups = [group for group in plan.weights.groups if group.layout.style is VOCAB]
    tables = [group.first for group in groups if len(group.tensors.shape) == 2]
    rows = [p.spec.shape[p.dim] for p in tables if p.dim is not None]
    more = sum(extra for key, extra in fields.VOCAB_EXTRA_ROWS.items() if key in text)
    more += sum(text[key] for key in fields.VOCAB_FURTHER if type(text.get(key)) is int)
    prompts = [text.get(key) for key in fields.VOCAB_PROMPTS]
    more += math.prod(n for n in prompts if type(n) is int) if None not in prompts else 0
    if stated is None or not rows or not {stated, stated + more}.isdisjoint(rows):
        return ""
    return (
        f"{tables[0].spec.name} has {rows[0]} rows, but config.json's vocab_size is {stated};"
        f" correct the config, or {FETCH}"
    )


def _find_missing_output(plan: Plan, recipe: Recipe, config: Config) -> str:
    """The output layer of a class that has one, by a config that says it is not the embedding."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(first, str) or not first.endswith(HEAD_CLASSES) or not _is_untied(config):
        return ""
    heads = [
        rule.pattern
        for rule in recipe.rules
        if rule.style is VOCAB and rule.pattern.rpartition(".")[2] in OUTPUT_MODULES
    ]
    groups = (group for group in plan.weights.groups if group.layout.style is VOCAB)
    modules = (group.tensors.pattern.removesuffix(".weight") for group in groups)
    if not heads or any(name.rpartition(".")[2] in OUTPUT_MODULES for name in modules):
        return ""
    return (
        f"{heads[0]}.weight is not there, though {first} has one and config.json's"
        f" tie_word_embeddings is false; {FETCH}, or correct the config"
    )


def _is_untied(config: Config) -> bool:
    """Whether a config says so; one that says nothing is of a class whose default is to tie."""
    tables = (config, config.get(fields.TEXT_TABLE))
    stated: Iterator[Any] = (
        table.get("tie_word_embeddings") for table in tables if isinstance(table, Mapping)
    )
    values = list(stated)
    return values[0] is False and True not in values
