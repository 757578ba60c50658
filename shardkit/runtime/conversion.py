"""From names on disk to a transformers model's own, by transformers' own conversion table.

Checkpoints keep older names, and store one by one what the model stacks (a mixture's experts).
Converting commutes with sharding, so each rank converts its own shard. The functions used are not
public API of transformers; this module is the only one that knows them.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    Split,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shardkit.planning import Placement

TABLE_OF_HEADS = "subconfig_key"  # an operation's: the table that counts heads, None for the whole


@dataclass(frozen=True)
class Conversion:
    """How tensors on disk become tensors of the model.

    `sources` are `(name on disk, pattern)` in the order the model stacks them; `target` the first
    name they make. `whole` is the shape of the whole first source, by which an operation that
    depends on the shape decides for every rank's part.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    whole: tuple[int, ...] = ()

    def select_sources(self, names: Collection[str]) -> "Conversion":
        """The conversion of those of its sources that have these names."""
        kept = tuple(source for source in self.sources if source[0] in names)
        return replace(self, sources=kept)

    def run(
        self,
        tensors: Mapping[str, torch.Tensor],
        model: PreTrainedModel,
        count_lengths: Callable[[str], Sequence[int]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The model's tensors, by name, made of these tensors on disk.

        Args:
            tensors: What it is made of: whole tensors, or a rank's part of each.
            model: The model.
            count_lengths: Of parts, how much of each section of a source the rank has.
        """
        first, _ = self.sources[0]
        if self.converter is None:
            return {self.target: tensors[first]}
        converter = deepcopy(self.converter)
        converter.operations = [
            _SplitPart(operation.dim, lengths)
            if isinstance(operation, Split) and count_lengths and (lengths := count_lengths(first))
            else operation
            for operation in self._choose_operations(converter, model)
        ]
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, lambda t=tensors[name]: t)
        config = self._count_local_heads(model.config, tensors, converter.operations)
        converted = converter.convert(self.target, model=model, config=config)
        return {name: t[0] if isinstance(t, list) else t for name, t in converted.items()}

    def _count_local_heads(
        self,
        config: Any,
        tensors: Mapping[str, torch.Tensor],
        operations: Sequence[ConversionOps],
    ) -> Any:
        """The config with the heads of this rank's part, for operations on each head of a table.

        They tell where a head ends from the number of heads.
        """
        counting = [op for op in operations if hasattr(op, TABLE_OF_HEADS)]
        part = tensors[self.sources[0][0]]
        if not counting or tuple(part.shape) == self.whole:
            return config
        local = deepcopy(config)
        for name in {getattr(op, TABLE_OF_HEADS) for op in counting}:
            table = local if name is None else getattr(local, name, local)
            table.num_attention_heads = table.num_attention_heads * len(part) // self.whole[0]
        return local

    def _choose_operations(
        self, converter: WeightConverter, model: PreTrainedModel
    ) -> Iterator[ConversionOps]:
        """The operations without those that leave a whole tensor of this shape as it is."""
        for operation in converter.operations:
            if getattr(operation, "check_dims", False):
                if self.whole == tuple(model.get_parameter_or_buffer(self.target).shape):
                    continue
                operation.check_dims = False
            yield operation


class _SplitPart(Split):  # type: ignore[misc]
    """Transformers' Split of one weight into several, by what a rank has of each."""

    def __init__(self, dim: int, lengths: Sequence[int]) -> None:
        super().__init__(dim)
        self.lengths = [*lengths]

    def convert(
        self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        pieces = torch.split(tensor, self.lengths, dim=self.dim)
        return {n: p.contiguous() for n, p in zip(target_patterns, pieces, strict=True)}


def find_conversions(
    model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], wrapper_prefix: str = ""
) -> list[Conversion]:
    """The conversions that take tensors into the model.

    As transformers does, it leaves out what the model has no place for, and of plain tensors of two
    names, the second. What the model needs and no tensor makes is an error later, so that a wrong
    name cannot pass for one that is left out.

    Args:
        model: The model, its tensors on any device.
        shapes: The whole shapes of the tensors, by name on disk.
        wrapper_prefix: What training wrappers put before each of the names.
    """
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    groups: defaultdict[tuple[str, bool], list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(shapes, key=dot_natural_key):
        plain, place = name.removeprefix(wrapper_prefix), (model.base_model_prefix, state)
        target, pattern = rename_source_key(plain, renamings, converters, *place)
        if target not in state and plain in state:  # the model's own, which is not to be renamed
            target, pattern = rename_source_key(plain, [], [], *place)
        if target not in state:
            continue
        group = (target, pattern is not None)
        if pattern is None and group in groups:
            continue  # stored under two names: the first counts
        groups[group].append((name, target if pattern is None else pattern))
    return [
        _make_conversion(group, sources, by_pattern, shapes) for group, sources in groups.items()
    ]


def loaded_shapes(placements: Mapping[str, Placement]) -> dict[str, tuple[int, ...]]:
    """The whole shapes of the tensors that a model is made of, by name on disk."""
    return {name: p.spec.shape for name, p in placements.items() if p.is_loaded}


def _make_conversion(
    group: tuple[str, bool],
    sources: Sequence[tuple[str, str]],
    by_pattern: Mapping[str, WeightConverter],
    shapes: Mapping[str, Sequence[int]],
) -> Conversion:
    target, is_stacked = group
    if not is_stacked:
        return Conversion(target, tuple(sources), None)
    name, pattern = sources[0]
    return Conversion(target, tuple(sources), by_pattern[pattern], tuple(shapes[name]))
