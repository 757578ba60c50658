"""Which tensors of a model family are sharded how, as data."""

from shardkit.recipe.catalog import find_recipe, is_bundled, list_recipe_files
from shardkit.recipe.compose import compose_recipe
from shardkit.recipe.counts import matches_config, resolve_counts, resolve_units
from shardkit.recipe.joint_sums import JointSum, match_joint_sums
from shardkit.recipe.model_classes import LoadedTensors, find_loaded_tensors, list_words
from shardkit.recipe.parse import load_recipe, parse_recipe
from shardkit.recipe.patterns import compile_module_pattern, compile_tensor_pattern
from shardkit.recipe.recipe import (
    ForwardArgument,
    ModuleAttribute,
    Part,
    Recipe,
    Rule,
    UnitRule,
)

__all__ = [
    "ForwardArgument",
    "JointSum",
    "LoadedTensors",
    "ModuleAttribute",
    "Part",
    "Recipe",
    "Rule",
    "UnitRule",
    "compile_module_pattern",
    "compile_tensor_pattern",
    "compose_recipe",
    "find_loaded_tensors",
    "find_recipe",
    "is_bundled",
    "list_recipe_files",
    "list_words",
    "load_recipe",
    "match_joint_sums",
    "matches_config",
    "parse_recipe",
    "resolve_counts",
    "resolve_units",
]
