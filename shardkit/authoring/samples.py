"""Samples: small configs of every family, kept as data with the recipes, and models of them.

A sample file is TOML. Each table is a sample: a model class of transformers and its config's
fields, on top of those of a `base` table. "none" stands for null, which TOML lacks.

    [base.decoder]
    hidden_size = 64

    [llama-two-kv-heads]
    model = "LlamaForCausalLM"
    base = "decoder"
    config.num_key_value_heads = 2
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from shardkit.checkpoint import read_config
from shardkit.errors import RecipeError
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.recipe.counts import matches_config
from shardkit.recipe.recipe import Recipe
from shardkit.runtime.models.registry import find_model_class

NULL = "none"
KEYS = {"model", "base", "config", "generation", "limitation", "as_built"}
WEIGHT_SEED = 0
NOISE_SEED = 7


@dataclass(frozen=True)
class Sample:
    """A small config.

    Attributes:
        name: Its name.
        model: A model class of transformers, or of this package.
        config: The fields of its config.
        limitation: A sentence on what transformers itself cannot do of it; usually empty.
        generation: The contents of its generation_config.json, if its class needs some.
        as_built: Whether it is saved under the names that the model has in memory, its experts
            stacked, as some checkpoints on the Hub are, or under those of the first checkpoints.
        group: The name of its file.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    limitation: str = ""
    as_built: bool = False
    group: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_class(self) -> Any:
        """The model class. Raises RecipeError if there is none."""
        model_class = find_model_class(self.model)
        if model_class is None:
            raise RecipeError(f"sample {self.name}: transformers has no {self.model}")
        return model_class

    @property
    def config_class(self) -> Any:
        """The class of its config: that of the model_type that it states, or else its model's."""
        stated = self.config.get("model_type")
        return CONFIG_MAPPING[stated] if stated else self.model_class.config_class

    @property
    def model_type(self) -> str:
        """The model_type of its config.json."""
        return str(self.config.get("model_type") or self.config_class.model_type)

    @property
    def stored_config(self) -> dict[str, Any]:
        """The contents of its config.json, defaults included."""
        return {**self.make_config().to_dict(), "model_type": self.model_type}

    def make_config(self) -> Any:
        """A new config."""
        fields = {name: value for name, value in self.config.items() if name != "model_type"}
        return self.config_class(**fields)


def list_samples() -> list[Sample]:
    """Every bundled sample, in the order of the files and within them."""
    files = sorted((find_recipe_folder() / "samples").glob("*.toml"))
    return [sample for path in files for sample in _keep_samples(path, path.stat().st_mtime_ns)]


@lru_cache
def _keep_samples(path: Path, _changed: int) -> tuple[Sample, ...]:
    """The samples of a file, read once until it is changed."""
    return tuple(read_samples(path))


def find_samples(recipe: Recipe) -> list[Sample]:
    """The bundled samples that a recipe is for."""
    return [
        sample
        for sample in list_samples()
        if sample.model_type in recipe.model_types and matches_config(recipe, sample.stored_config)
    ]


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of one file. Raises RecipeError for an entry that is not a sample."""
    table = tomllib.loads(path.read_text())
    bases = table.pop("base", {})
    for name, entry in table.items():
        base = entry.get("base")
        if not entry.keys() <= KEYS or "model" not in entry or (base and base not in bases):
            raise RecipeError(f"{path.name}: {name}: needs a model, and a base that is there")
        yield Sample(
            name=name,
            model=entry["model"],
            config=_replace_nulls({**bases.get(base, {}), **entry.get("config", {})}),
            limitation=entry.get("limitation", ""),
            as_built=entry.get("as_built", False),
            group=path.stem,
            generation=entry.get("generation", {}),
        )


def make_sample(sample: Sample, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a sample's model as transformers does, its weights from a seed. Returns `folder`."""
    config = sample.make_config()
    save_random_model(sample.model_class, config, folder, dtype, as_built=sample.as_built)
    if config.model_type != sample.model_type:  # a second name of one config class
        path = folder / "config.json"
        path.write_text(json.dumps({**read_config(folder), "model_type": sample.model_type}))
    if sample.generation:  # as published: a file of its own, not one derived from the config
        (folder / "generation_config.json").write_text(json.dumps(dict(sample.generation)))
    return folder


def save_random_model(
    cls: Any,
    config: Any,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    as_built: bool = False,
) -> Path:
    """Save a model with random weights from a seed, every parameter of which matters.

    Args:
        cls: The model class.
        config: Its config.
        folder: Where to save it.
        dtype: The dtype to save the weights in.
        as_built: Whether to keep the names that the model has in memory.

    Returns:
        `folder`.
    """
    torch.manual_seed(WEIGHT_SEED)
    model = cls(config)
    perturb(model)
    model.to(dtype).save_pretrained(folder, save_original_format=not as_built)
    return folder


def perturb(model: PreTrainedModel) -> None:
    """Add noise to every parameter, so that those initialized to 0 or 1 (biases, norms) matter."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            scale = 0.08 if parameter.ndim > 1 else 0.2
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def _replace_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nulls(item) for key, item in value.items()}
    return None if value == NULL else value
