"""The plan of an open checkpoint: its recipe found, its config checked, and nothing missing."""

from shardkit.checkpoint import Checkpoint
from shardkit.errors import CheckpointError
from shardkit.planning.completeness import find_empty_tensor, find_missing
from shardkit.planning.layout_plan import Plan
from shardkit.planning.make_plan import make_plan
from shardkit.recipe import Recipe, find_recipe


def plan_for(
    checkpoint: Checkpoint,
    tp_size: int,
    recipe: Recipe | str | None = None,
    expert_parallel: bool = False,
) -> tuple[Recipe, Plan]:
    """The recipe of a checkpoint, and its plan over `tp_size` ranks.

    Args:
        checkpoint: An open checkpoint.
        tp_size: The number of ranks.
        recipe: A recipe, or the name or path of one, instead of the one for its model_type.
        expert_parallel: Whether each rank has whole experts, instead of a part of every one.

    Raises:
        CheckpointError: If the config contradicts the tensors, or a tensor is missing.
        RecipeError: If there is no recipe for it, or the recipe does not fit.
        LayoutError: If it cannot be divided over so many ranks.
    """
    if not isinstance(recipe, Recipe):
        recipe = find_recipe(checkpoint.config, recipe)
    checkpoint.check_config()
    prefix, specs = checkpoint.wrapper_prefix, checkpoint.specs()
    if fault := find_empty_tensor(specs, recipe, prefix):
        raise CheckpointError(f"{checkpoint.folder}: {fault}")
    plan = make_plan(specs, recipe, checkpoint.config, tp_size, expert_parallel)
    if fault := find_missing(plan, recipe, checkpoint.config):
        raise CheckpointError(f"{checkpoint.folder}: {fault}")
    return recipe, plan
