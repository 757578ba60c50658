"""Where each element of a tensor on disk lies among the parameters of the model in memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardkit.checkpoint import Checkpoint
from shardkit.errors import RecipeError

NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")
LEAF = re.compile(r"\.(?:weight|bias)$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk, and the module that it becomes a parameter of.

    Attributes:
        name: Its name on disk.
        shape: Its shape on disk.
        owner: The module that holds its elements in memory.
        kind: That module's kind: linear, conv1d, conv, embedding, norm or other.
        depth: The number of dimensions of the parameter that holds its elements.
        positions: An int64 tensor of `shape`: the index of each element among all elements of the
            model's parameters, one parameter after another.
    """

    name: str
    shape: tuple[int, ...]
    owner: str
    kind: str
    depth: int
    positions: Any

    @property
    def pattern(self) -> str:
        """The recipe pattern of its module, each number written as `*`."""
        return name_pattern(self.name)

    @property
    def layer(self) -> str:
        """Its name up to the first number; empty if it is in no numbered layer."""
        number = NUMBER.search(self.name)
        return self.name[: number.end()] if number else ""

    @property
    def input_dim(self) -> int | None:
        """The dimension of the input features, if the module's kind says which it is."""
        if len(self.shape) < 2 or self.kind == "embedding":
            return None
        return len(self.shape) - 2 if self.kind == "conv1d" else len(self.shape) - 1

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The dimensions that may be the input features of a row-parallel layer."""
        ndim = len(self.shape)
        if self.kind in ("linear", "conv1d") and self.input_dim is not None:
            return (self.input_dim,)
        is_stacked = self.kind == "other" and ndim > 1 and self.depth > 2
        return (ndim - 1, ndim - 2) if is_stacked else ()

    @property
    def output_dim(self) -> int:
        """The dimension of the output features, which a column rule divides."""
        if len(self.shape) < 2:
            return 0
        return len(self.shape) - (1 if self.kind in ("conv1d", "embedding") else 2)

    @property
    def output_dims(self) -> tuple[int, ...]:
        """The dimensions that may be output features, likeliest first; none for a plain norm."""
        ndim = len(self.shape)
        if self.kind == "norm" and ndim == 1:
            return ()
        if self.kind == "conv":
            return (0,)
        if self.kind == "other" and ndim > 1:
            return tuple(dict.fromkeys((ndim - 2, ndim - 1, 0)))
        return (self.output_dim,)


@dataclass(frozen=True)
class LoadedModel:
    """A tiny model in memory, and the names and shapes of its tensors on disk."""

    folder: Path
    model: Any
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The index of each parameter's first element among all elements of all parameters."""
        offsets, next_offset = {}, 0
        for name, parameter in self.model.named_parameters():
            offsets[name] = next_offset
            next_offset += parameter.numel()
        return offsets

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor on disk that becomes a parameter of the model, in the order on disk.

        Raises:
            RecipeError: transformers does more than move elements when it loads the checkpoint.
        """
        from shardkit.runtime.conversion import find_conversions

        tensors: list[StoredTensor] = []
        for conversion in find_conversions(self.model, self.shapes):
            names = [name for name, _ in conversion.sources]
            tensors += self._trace_conversion(names, conversion)
        order = {name: index for index, name in enumerate(self.shapes)}
        return tuple(sorted(tensors, key=lambda tensor: order[tensor.name]))

    def _trace_conversion(self, names: Sequence[str], conversion: Any) -> list[StoredTensor]:
        """The tensors of one conversion, found by converting element numbers in their place."""
        import torch

        numbered, total = self._number_elements(names)
        positions, owners, depth = torch.full((total,), -1), set(), 0
        for target, numbers in conversion.run(numbered, self.model).items():
            if target not in self.offsets:
                continue  # a buffer, or tied to another parameter
            flat = numbers.flatten().long()
            positions[flat] = torch.arange(flat.numel()) + self.offsets[target]
            owners.add(target.rpartition(".")[0])
            depth = numbers.ndim
        if not owners:
            return []
        if len(owners) > 1 or bool((positions < 0).any()):
            raise RecipeError(
                f"{names[0]}: transformers does not only move its elements when it loads them, so"
                " they cannot be traced"
            )
        owner = owners.pop()
        kind = module_kind(self.model.get_submodule(owner))
        return [
            StoredTensor(
                name=name,
                shape=tuple(self.shapes[name]),
                owner=owner,
                kind=kind,
                depth=depth,
                positions=positions[numbered[name].long()],
            )
            for name in names
        ]

    def _number_elements(self, names: Sequence[str]) -> tuple[dict[str, Any], int]:
        """The elements of these tensors numbered from 0, in float64, and how many there are."""
        import torch

        numbered, total = {}, 0
        for name in names:
            count = torch.Size(self.shapes[name]).numel()
            numbers = torch.arange(total, total + count, dtype=torch.float64)
            numbered[name] = numbers.reshape(self.shapes[name])
            total += count
        return numbered, total


def load_tiny_model(folder: Path) -> LoadedModel:
    """Load a tiny model's folder with implementations that second derivatives can be taken of."""
    from shardkit.authoring.masked_sum import load_reference

    with Checkpoint(folder) as checkpoint:
        shapes = {spec.name: tuple(spec.shape) for spec in checkpoint.specs()}
        config = dict(checkpoint.config)
    model = load_reference(folder)
    for choose_implementation in ("set_attn_implementation", "set_experts_implementation"):
        try:
            getattr(model, choose_implementation)("eager")
        except (AttributeError, ValueError, NotImplementedError):
            continue  # the class offers no choice; the one it has is tried
    return LoadedModel(folder, model, config, shapes)


def name_pattern(name: str) -> str:
    """The recipe pattern of a tensor's module: without `.weight` or `.bias`, numbers as `*`."""
    return star_numbers(LEAF.sub("", name))


def star_numbers(path: str) -> str:
    """A dotted path with each number written as `*`."""
    return NUMBER.sub("*", path)


def module_kind(module: Any) -> str:
    """What a module is: linear, conv1d (transformers' linear), conv, embedding, norm or other."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    from shardkit.runtime.layers.linear import is_conv1d

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_conv1d(module):
        return "conv1d"
    if isinstance(module, _ConvNd):
        return "conv"
    return "norm" if "Norm" in type(module).__name__ else "other"
