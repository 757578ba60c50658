"""Runs a recipe's proof on its samples, or on a model of one's own, and on recipes made wrong."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from shardkit.authoring.mutations import Mutant, mutants
from shardkit.authoring.proof import FOREIGN, Proof, prove
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, make_sample, samples, save_random
from shardkit.errors import CheckpointError, RecipeError
from shardkit.recipe.counts import matches_config
from shardkit.recipe.recipe import Recipe
from shardkit.runtime.config import read_model_config
from shardkit.runtime.loader import resolve_model_class

BEAMS = 3
MAX_PARAMETERS = 200_000_000  # of a model that is made up to check a recipe: seconds, not minutes


@dataclass(frozen=True)
class Trial:
    """A recipe's proof on one model at one tp_size."""

    recipe: Recipe
    model: str
    tp_size: int
    proof: Proof


def served_samples(recipe: Recipe) -> list[Sample]:
    """The bundled samples that a recipe serves."""
    return [
        sample
        for sample in samples()
        if sample.model_type in recipe.model_types and matches_config(recipe, sample.stored_config)
    ]


def make_models(recipe: Recipe, config: Path | None, folder: Path) -> dict[str, Path]:
    """Small checkpoints to check a recipe on, by name: its samples, or one of a config's size.

    Raises RecipeError where there is none, or it would be large.
    """
    if config is not None:
        return {str(config): make_like(config, folder / "model")}
    found = served_samples(recipe)
    if not found:
        raise RecipeError(
            f"recipe {recipe.name!r}: no bundled sample has its model_types"
            f" ({', '.join(recipe.model_types)}); give a small config with --config DIR"
        )
    return {sample.name: make_sample(sample, folder / sample.name) for sample in found}


def make_like(config: Path, folder: Path) -> Path:
    """Save a model with random weights of a folder's config.json.

    Raises RecipeError if it is large, and CheckpointError for a config that no model can have.
    """
    found = read_model_config(config)
    try:
        cls = resolve_model_class(found)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(found).parameters())
        if size <= MAX_PARAMETERS:
            return save_random(cls, found, folder)
    except FOREIGN as fault:  # whatever a model's class makes of a config
        told = str(fault).split("\n")[0]
        raise CheckpointError(f"{config}/config.json: no model can have it: {told}") from None
    raise RecipeError(
        f"{config}: {size:,} parameters, more than the {MAX_PARAMETERS:,} that a recipe is"
        " checked on; give a config with fewer layers and smaller widths"
    )


def try_recipe(
    recipe: Recipe, models: Mapping[str, Path], tp_sizes: Iterable[int], pool: RankPool
) -> Iterator[Trial]:
    """The recipe's proof on each model at each tp_size, as each is done."""
    for tp_size in tp_sizes:
        for name, source in models.items():
            with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
                proof = prove(source, recipe, pool.of(tp_size), Path(scratch), BEAMS)
            yield Trial(recipe, name, tp_size, proof)


Models = Sequence[tuple[Path, Mapping[str, frozenset[str]]]]


def caught(
    recipe: Recipe, models: Models, tp_size: int, pool: RankPool, at_most: int
) -> Iterator[tuple[Mutant, Proof]]:
    """Errors planted in a recipe, and the proof of each, which must not pass.

    `models` are checkpoints and the rules each uses.  A mutant is tried on each that uses its rule
    until one fails: some have no bias, and many head counts need no attribute.
    """
    rules: dict[str, frozenset[str]] = {}
    for _, used in models:
        rules |= {pattern: rules.get(pattern, frozenset()) | used[pattern] for pattern in used}
    for mutant in islice(mutants(recipe, rules), at_most):
        own = [model for model, used in models if mutant.pattern in used]
        for source in own or [model for model, _ in models]:
            with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
                proof = prove(source, mutant.recipe, pool.of(tp_size), Path(scratch))
            if not proof.passed:
                break
        yield mutant, proof
