"""Samples: small configs of every family, kept as data beside the recipes, and models made of them.

A sample file is TOML.  Each table is a sample: a model class of transformers and its config's
fields, over those of a `base` table.  "none" stands for null, which TOML lacks.

    [base.decoder]
    hidden_size = 64

    [llama-two-kv-heads]
    model = "LlamaForCausalLM"
    base = "decoder"
    config.num_key_value_heads = 2
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.errors import RecipeError
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.runtime.models.registry import find_model_class

NULL = "none"
KEYS = {"model", "base", "config", "apart", "as_built"}
SEED = 7


@dataclass(frozen=True)
class Sample:
    """A small config.  `apart` says in a sentence where transformers itself cannot do all of it.

    `as_built` saves it under the names that the model has in memory, its experts stacked, as some
    checkpoints on the Hub are; otherwise it has the names of the first checkpoints.  `group` is the
    name of its file.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    apart: str = ""
    as_built: bool = False
    group: str = ""

    @property
    def model_class(self) -> Any:
        """The class of transformers, or built in."""
        found = find_model_class(self.model)
        if found is None:
            raise RecipeError(f"sample {self.name}: transformers has no {self.model}")
        return found

    @property
    def model_type(self) -> str:
        """The model_type its config.json has."""
        return str(self.model_class.config_class.model_type)

    @property
    def stored_config(self) -> dict[str, Any]:
        """What its config.json says, defaults included."""
        found: dict[str, Any] = self.model_class.config_class(**self.config).to_dict()
        return found


def samples() -> list[Sample]:
    """Every bundled sample, in the order of its file."""
    files = sorted((find_recipe_folder() / "samples").glob("*.toml"))
    return [sample for path in files for sample in read_samples(path)]


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of one file.  Raises RecipeError for one that is not as it should be."""
    table = tomllib.loads(path.read_text())
    bases = table.pop("base", {})
    for name, entry in table.items():
        base = entry.get("base")
        if not entry.keys() <= KEYS or "model" not in entry or (base and base not in bases):
            raise RecipeError(f"{path.name}: {name}: needs a model, and a base that is there")
        config = {**bases.get(base, {}), **entry.get("config", {})}
        apart, as_built = entry.get("apart", ""), entry.get("as_built", False)
        yield Sample(name, entry["model"], _nulls(config), apart, as_built, path.stem)


def make_sample(sample: Sample, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a sample's model as transformers does, its weights from a seed.  Returns `folder`."""
    cls = sample.model_class
    config = cls.config_class(**sample.config)
    return save_random(cls, config, folder, dtype, as_built=sample.as_built)


def save_random(
    cls: Any,
    config: Any,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    as_built: bool = False,
) -> Path:
    """Save a model with weights from a seed, biases and norms made to matter.  Returns `folder`."""
    torch.manual_seed(0)
    model = cls(config)
    shake(model)
    model.to(dtype).save_pretrained(folder, save_original_format=not as_built)
    return folder


def shake(model: PreTrainedModel) -> None:
    """Move every parameter, so that biases, norms and sinks that start at 0 or 1 matter."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            size = 0.08 if parameter.ndim > 1 else 0.2
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(item) for key, item in value.items()}
    return None if value == NULL else value
