"""From names on disk to a transformers model's own, by transformers' own conversion table.

Checkpoints keep older names, and store one by one what the model stacks (a mixture's experts).
Converting commutes with sharding, so each rank converts its own shard. The functions used are not
public API of transformers; this module is the only one that knows them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shardkit.errors import ManifestError


@dataclass(frozen=True)
class Conversion:
    """How tensors on disk become tensors of the model.

    `sources` are `(name on disk, pattern)` in the order the model stacks them; `target` the first
    name they make.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None

    def run(
        self, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        """The model's tensors, by name, made of these tensors on disk."""
        if self.converter is None:
            return {self.target: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, lambda t=tensors[name]: t)
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in converted.items()}


def find_conversions(
    model: PreTrainedModel, names: Iterable[str], wrapper_prefix: str = ""
) -> list[Conversion]:
    """The conversions that take these names on disk into the model.

    A name that the model's class says to skip (keys of a layer that uses another's) is left out.
    Raises ManifestError for any other that the model has no place for.

    Args:
        model: The model, its tensors on any device.
        names: The names on disk.
        wrapper_prefix: What training wrappers put before each of them.
    """
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    groups: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        plain = name.removeprefix(wrapper_prefix)
        target, pattern = rename_source_key(
            plain, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and is_skipped_key(model, target):
            continue
        if target not in state:
            raise ManifestError(f"{name}: {type(model).__name__} has no tensor {target!r} for it")
        group = ("", name) if pattern is None else (target, "")
        groups[group].append((name, target if pattern is None else pattern))
    return [_make_conversion(group, sources, by_pattern) for group, sources in groups.items()]


def is_skipped_key(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's class says that a tensor it lacks may be in a checkpoint."""
    return any(re.search(p, name) for p in model._keys_to_ignore_on_load_unexpected or ())


def _make_conversion(
    group: tuple[str, str],
    sources: Sequence[tuple[str, str]],
    by_pattern: Mapping[str, WeightConverter],
) -> Conversion:
    stacked, _ = group
    if not stacked:
        return Conversion(sources[0][1], tuple(sources), None)
    return Conversion(stacked, tuple(sources), by_pattern[sources[0][1]])
