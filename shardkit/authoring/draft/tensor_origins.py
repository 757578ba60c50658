"""What is on disk, and where in the model's own tensors each of its elements comes to lie."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardkit.checkpoint import Checkpoint
from shardkit.errors import RecipeError

NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")
LEAF = re.compile(r"\.(?:weight|bias)$")


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    `owner` is the module that holds its elements, `kind` that module's: linear, conv1d, conv,
    embedding, norm or other.  `depth` is the number of dimensions it has there.  `positions` has
    its shape: where each element lies among the model's, one after another.
    """

    name: str
    shape: tuple[int, ...]
    owner: str
    kind: str
    depth: int
    positions: Any

    @property
    def pattern(self) -> str:
        """The rule pattern of its module, numbers as `*`."""
        return NUMBER.sub("*", LEAF.sub("", self.name))

    @property
    def layer(self) -> str:
        """The name as far as its first number; empty for what lies outside of layers."""
        found = NUMBER.search(self.name)
        return self.name[: found.end()] if found else ""

    @property
    def in_dim(self) -> int | None:
        """The dimension of the input features, where one can tell."""
        if len(self.shape) < 2 or self.kind == "embedding":
            return None
        return len(self.shape) - 2 if self.kind == "conv1d" else len(self.shape) - 1

    @property
    def last_dims(self) -> tuple[int, ...]:
        """The dimensions that may be the input features of a layer that ends a region."""
        many = len(self.shape)
        if self.kind in ("linear", "conv1d") and self.in_dim is not None:
            return (self.in_dim,)
        return (many - 1, many - 2) if self.kind == "other" and many > 1 and self.depth > 2 else ()

    @property
    def out_dim(self) -> int:
        """The dimension that a column rule divides, as far as the kind of module tells."""
        if len(self.shape) < 2:
            return 0
        return len(self.shape) - (1 if self.kind in ("conv1d", "embedding") else 2)


@dataclass(frozen=True)
class Small:
    """A small model in memory, with what it is on disk."""

    folder: Path
    model: Any
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each of the model's own parameters begins, all laid one after another."""
        at, found = 0, {}
        for name, parameter in self.model.named_parameters():
            found[name] = at
            at += parameter.numel()
        return found

    @cached_property
    def tensors(self) -> tuple[Stored, ...]:
        """Every tensor on disk that makes parameters of the model.

        Raises RecipeError where transformers does more than move elements as it loads.
        """
        from shardkit.runtime.conversion import find_conversions

        found: list[Stored] = []
        for conversion in find_conversions(self.model, self.shapes):
            names = [name for name, _ in conversion.sources]
            found += self._placed(names, conversion)
        order = {name: at for at, name in enumerate(self.shapes)}
        return tuple(sorted(found, key=lambda t: order[t.name]))

    def _placed(self, names: list[str], conversion: Any) -> list[Stored]:
        """The tensors of one conversion: it is run on numbers that tell where they came from."""
        import torch

        numbered, start = {}, 0
        for name in names:
            count = torch.Size(self.shapes[name]).numel()
            ids = torch.arange(start, start + count, dtype=torch.float64)
            numbered[name], start = ids.reshape(self.shapes[name]), start + count
        places, owners, depth = torch.full((start,), -1), set(), 0
        for target, made in conversion.run(numbered, self.model).items():
            if target not in self.offsets:
                continue  # a buffer, or tied to another
            there = made.flatten().long()
            places[there] = torch.arange(there.numel()) + self.offsets[target]
            owners.add(target.rpartition(".")[0])
            depth = made.ndim
        if not owners:
            return []
        if len(owners) > 1 or bool((places < 0).any()):
            raise RecipeError(
                f"{names[0]}: transformers changes it as it loads, so nothing is told"
            )
        owner = owners.pop()
        return [
            Stored(
                name, tuple(self.shapes[name]), owner, kind_of(self.model.get_submodule(owner)),
                depth, places[numbered[name].long()],
            )
            for name in names
        ]  # fmt: skip


def open_small(folder: Path) -> Small:
    """Load a small model's folder, in a form that derivatives can be taken of."""
    from shardkit.authoring.masked_sum import load

    with Checkpoint(folder) as checkpoint:
        shapes = {spec.name: tuple(spec.shape) for spec in checkpoint.specs()}
        config = dict(checkpoint.config)
    model = load(folder)
    for choose in ("set_attn_implementation", "set_experts_implementation"):
        try:
            getattr(model, choose)("eager")
        except (AttributeError, ValueError, NotImplementedError):
            continue  # it has no choice, and what it has is tried
    return Small(folder, model, config, shapes)


def kind_of(module: Any) -> str:
    """What a module is: linear, conv1d (transformers' linear), conv, embedding, norm, or other."""
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
