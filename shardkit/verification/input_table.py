"""What a model's forward pass needs, for the types for which it is stated as data.

Most inputs follow from a config (`dummy_inputs`). What does not is in `recipes/shared/inputs.toml`:

    [tiles]
    model_types = ["mllama"]
    pixel_values = ["batch", 1, "vision_config.max_num_tiles", 3, "vision_config.image_size", 8]
    aspect_ratio_ids = { shape = ["batch", 1], value = 1 }
    image_grid_thw = { values = [[1, 4, 6], [1, 4, 6]] }
    placeholders = [{ token = "image_token_id", count = "vision_config.image_size // 4" }]

A list of lengths is a tensor of noise; with a `value` it is filled with that value; `join` is a
list of such, joined along their last axis. "none" stands for an argument that is not to be given.
Strings are arithmetic over numbers, fields of the config, and `batch` and `length` (of the text).
"""

import ast
import operator
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from shardkit.errors import RecipeError
from shardkit.recipe.catalog import find_recipe_folder

NOISE_SEED = 21
NOT_GIVEN = "none"
IMAGE_KIND = 1  # of a token, as transformers' processors number them: text 0, image 1
OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Tokens of a text that stand for an image or a sound.

    Attributes:
        token: Their id.
        count: How many stand in a row.
        kind: Their kind, for models that are told it.
    """

    token: int
    count: int
    kind: int = IMAGE_KIND


@dataclass(frozen=True, slots=True)
class InputTable:
    """The inputs that are stated for some model types.

    Attributes:
        name: Its name in the file.
        arguments: Argument of `forward` → lengths, or a table of lengths and a value, or of values.
        placeholders: Tables of a token, a count and a kind.
    """

    name: str
    arguments: Mapping[str, Any]
    placeholders: Sequence[Mapping[str, Any]]

    def make_tensors(self, sizes: Mapping[str, int], config: Any) -> dict[str, torch.Tensor]:
        """The tensors of its arguments.

        Args:
            sizes: The numbers that are no fields of a config, by name.
            config: The model's config.

        Raises:
            RecipeError: An expression of the table has no value for this config.
        """
        return {
            name: _make_tensor(entry, lambda text: self._count(text, sizes, config))
            for name, entry in self.arguments.items()
            if entry != NOT_GIVEN
        }

    @property
    def exclusions(self) -> frozenset[str]:
        """The arguments that are not to be given, though they might be made from the config."""
        return frozenset(name for name, entry in self.arguments.items() if entry == NOT_GIVEN)

    def list_placeholders(self, sizes: Mapping[str, int], config: Any) -> list[Placeholders]:
        """The tokens that a text needs for these tensors. Raises RecipeError as make_tensors."""
        return [
            Placeholders(
                self._count(entry["token"], sizes, config),
                self._count(entry["count"], sizes, config),
                entry.get("kind", IMAGE_KIND),
            )
            for entry in self.placeholders
        ]

    def _count(self, text: Any, sizes: Mapping[str, int], config: Any) -> Any:
        if not isinstance(text, str):
            return text
        try:
            return _evaluate(ast.parse(text, mode="eval").body, sizes, config)
        except (AttributeError, LookupError, SyntaxError, TypeError) as error:
            message = f"inputs.toml: {self.name}: {text!r} has no value for this config"
            raise RecipeError(message) from error


def find_input_table(model_type: str) -> InputTable | None:
    """The inputs stated for a model type; None for most."""
    return _load_tables().get(model_type)


@cache
def _load_tables() -> Mapping[str, InputTable]:
    path = find_recipe_folder() / "shared" / "inputs.toml"
    tables = {}
    for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
        model_types = entry.pop("model_types")
        placeholders = entry.pop("placeholders", [])
        for model_type in model_types:
            if model_type in tables:
                raise RecipeError(f"inputs.toml: {name}: {model_type} is in another table, too")
            tables[model_type] = InputTable(name, entry, placeholders)
    return tables


def _make_tensor(entry: Any, count: Callable[[Any], Any]) -> torch.Tensor:
    if isinstance(entry, Mapping) and "values" in entry:
        return torch.tensor(_replace_fields(entry["values"], count))
    if isinstance(entry, Mapping) and "join" in entry:
        return torch.cat([_make_tensor(part, count) for part in entry["join"]], -1)
    lengths = entry["shape"] if isinstance(entry, Mapping) else entry
    shape = [count(length) for length in lengths]
    if isinstance(entry, Mapping):
        return torch.full(shape, count(entry["value"]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED))


def _replace_fields(values: Any, count: Callable[[Any], Any]) -> Any:
    if isinstance(values, list):
        return [_replace_fields(value, count) for value in values]
    return count(values)


def _evaluate(node: ast.expr, sizes: Mapping[str, int], config: Any) -> Any:
    """The value of an expression; a name is one of the sizes, or else a field of the config."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return sizes[name] if name in sizes else getattr(config, name)
        case ast.Attribute(value=owner, attr=name):
            return getattr(_evaluate(owner, sizes, config), name)
        case ast.Subscript(value=owner, slice=ast.Constant(value=at)):
            return _evaluate(owner, sizes, config)[at]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            values = _evaluate(left, sizes, config), _evaluate(right, sizes, config)
            return OPERATIONS[type(op)](*values)
    raise SyntaxError("not arithmetic over numbers and fields")
