"""Proves a recipe on its samples or on a model of the user's own, and tries mutants of it."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch

from shardkit.authoring.expert_faults import (
    group_stacks,
    inject_expert_faults,
    plan_whole_experts,
)
from shardkit.authoring.mutations import Mutant, list_mutants
from shardkit.authoring.proof import Proof, prove_recipe
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import find_samples, make_sample, save_random_model
from shardkit.checkpoint import Checkpoint, read_config
from shardkit.errors import MODEL_ERRORS, CheckpointError, RecipeError
from shardkit.planning import make_plan
from shardkit.recipe import Recipe, compose_recipe
from shardkit.runtime.config import read_model_config
from shardkit.runtime.rank_shard import resolve_model_class

BEAMS = 3
MAX_PARAMETERS = 200_000_000  # of a random model to check a recipe on: seconds, not minutes
SCRATCH = "shardkit-"  # how the temporary folders are named


@dataclass(frozen=True)
class ModelProof:
    """The proof of a recipe on one model over one number of ranks.

    With `expert_parallel`, each rank had whole experts.
    """

    model: str
    tp_size: int
    proof: Proof
    expert_parallel: bool = False


@dataclass(frozen=True)
class MutantResult:
    """A mutant, and the last proof that was tried on it, which should have failed."""

    mutant: Mutant
    proof: Proof

    @property
    def detected(self) -> bool:
        """Whether a check failed."""
        return not self.proof.passed

    @property
    def detected_by(self) -> str:
        """The check that failed; empty if none did."""
        return self.proof.checks[-1].name if self.detected else ""

    @property
    def missed(self) -> bool:
        """Whether no check failed, though one should have."""
        return self.mutant.must_be_detected and not self.detected

    def to_json(self) -> dict[str, object]:
        """The result as JSON values."""
        return {
            "fault": self.mutant.fault,
            "pattern": self.mutant.pattern,
            "must_be_detected": self.mutant.must_be_detected,
            "detected": self.detected,
            "detected_by": self.detected_by,
        }


def make_models(recipe: Recipe, config: Path | None, folder: Path) -> dict[str, Path]:
    """Small checkpoints to check a recipe on, by name.

    Args:
        recipe: The recipe.
        config: A folder with a config.json, or None for the recipe's bundled samples.
        folder: Where to save them.

    Raises:
        RecipeError: There is no sample, or the config is that of a large model.
    """
    if config is not None:
        return {str(config): make_model(config, folder / "model")}
    samples = find_samples(recipe)
    if not samples:
        raise RecipeError(
            f"recipe {recipe.name!r}: no bundled sample has its model_types"
            f" ({', '.join(recipe.model_types)}); give a small config with --config DIR"
        )
    return {sample.name: make_sample(sample, folder / sample.name) for sample in samples}


def make_model(config_folder: Path, folder: Path) -> Path:
    """Save a model with random weights of a folder's config.json. Returns `folder`.

    Raises:
        RecipeError: The model is large.
        CheckpointError: transformers cannot build a model from the config.
    """
    config = read_model_config(config_folder)
    try:
        cls = resolve_model_class(config)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size <= MAX_PARAMETERS:
            return save_random_model(cls, config, folder)
    except MODEL_ERRORS as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{config_folder}/config.json: transformers cannot build a model from this config:"
            f" {reason}"
        ) from None
    raise RecipeError(
        f"{config_folder}: {size:,} parameters, more than the {MAX_PARAMETERS:,} that a recipe is"
        " checked on; give a config with fewer layers and smaller widths"
    )


def prove_on_models(
    recipe: Recipe, models: Mapping[str, Path], tp_sizes: Iterable[int], pool: RankPool
) -> Iterator[ModelProof]:
    """Prove a recipe on each model over each number of ranks; yield each proof as it is done.

    A mixture is also proven with whole experts on each rank, if it has so many.
    """
    for tp_size in tp_sizes:
        for name, source in models.items():
            for expert_parallel in (False, True):
                if expert_parallel and plan_whole_experts(source, recipe, tp_size) is None:
                    continue
                ranks = pool.of(tp_size)
                with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
                    options = (BEAMS, True, expert_parallel)
                    proof = prove_recipe(source, recipe, ranks, Path(scratch), *options)
                yield ModelProof(name, tp_size, proof, expert_parallel)


def run_mutants(
    recipe: Recipe,
    models: Mapping[Path, Mapping[str, frozenset[str]]],
    tp_size: int,
    pool: RankPool,
    limit: int,
) -> Iterator[MutantResult]:
    """Try mutants of a recipe, each on the models that use its rule until a check fails.

    Before them, the experts of the first model that has some are distributed wrongly.

    Args:
        recipe: The right recipe.
        models: Checkpoints, and the rules that each uses, with the tensors that they name.
        tp_size: The number of ranks.
        pool: The ranks.
        limit: How many mutants to try at most.
    """
    yield from run_expert_faults(recipe, models, tp_size, pool)
    composed = {source: compose_recipe(recipe, read_config(source)) for source in models}
    for mutant, sources in islice(_list_mutants(composed, models), limit):
        for source in sources:
            with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
                proof = prove_recipe(source, mutant.recipe, pool.of(tp_size), Path(scratch))
            if not proof.passed:
                break  # some models have no bias, and many need no attribute
        if proof.passed and all(plans_alike(s, recipe, mutant.recipe, tp_size) for s in sources):
            mutant = replace(mutant, must_be_detected=False)
        yield MutantResult(mutant, proof)


def plans_alike(source: Path, recipe: Recipe, other: Recipe, tp_size: int) -> bool:
    """Whether two recipes place every tensor of a checkpoint alike.

    A rule that is left out may be one too many: a tensor that no rule names goes by that for its
    other name.
    """
    with Checkpoint(source) as checkpoint:
        specs, config = checkpoint.specs(), checkpoint.config
        first, second = (make_plan(specs, each, config, tp_size) for each in (recipe, other))
    return [*first.placements] == [*second.placements]


def run_expert_faults(
    recipe: Recipe, models: Iterable[Path], tp_size: int, pool: RankPool
) -> Iterator[MutantResult]:
    """Distribute the experts of the first model that has some wrongly; nothing if none has."""
    for source in models:
        if (plan := plan_whole_experts(source, recipe, tp_size)) is None:
            continue
        stack = next(iter(group_stacks(plan)))
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            faults = inject_expert_faults(source, recipe, plan, pool.of(tp_size), Path(scratch))
            for fault, check in faults:
                yield MutantResult(Mutant(fault, stack, recipe), Proof((check,)))
        return


def _list_mutants(
    composed: Mapping[Path, Recipe], models: Mapping[Path, Mapping[str, frozenset[str]]]
) -> Iterator[tuple[Mutant, list[Path]]]:
    """Mutants of each recipe that the models have, in turns, and the models to try each on."""
    mutants = []
    for recipe in {each.sha256: each for each in composed.values()}.values():
        sources = [source for source in models if composed[source].sha256 == recipe.sha256]
        rules: dict[str, frozenset[str]] = {}
        for used in (models[source] for source in sources):
            rules |= {pattern: rules.get(pattern, frozenset()) | used[pattern] for pattern in used}
        mutants.append([(mutant, sources) for mutant in list_mutants(recipe, rules)])
    keys = set()
    for mutant, sources in filter(None, chain.from_iterable(zip_longest(*mutants))):
        if (mutant.fault, mutant.pattern) not in keys:
            keys.add((mutant.fault, mutant.pattern))
            using = [source for source in sources if mutant.pattern in models[source]]
            yield mutant, using or sources
