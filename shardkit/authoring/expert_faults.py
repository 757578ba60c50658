"""Injects faults into the distribution of experts, to see that level 3 detects them.

The shards are split from a checkpoint whose experts are each in the place of the one before, as
ranks would have them that count experts from another first one.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from shardkit.authoring.masked_sum import WEIGHT_FILE
from shardkit.checkpoint import Checkpoint
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import LayoutError
from shardkit.layout.style import EXPERT
from shardkit.planning import Placement, Plan, make_plan
from shardkit.recipe import Recipe
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from shardkit.verification.report import Check


def plan_whole_experts(source: Path, recipe: Recipe, tp_size: int) -> Plan | None:
    """The expert-parallel plan of a checkpoint; None if it has too few experts, or none."""
    with Checkpoint(source) as checkpoint:
        try:
            return make_plan(checkpoint.specs(), recipe, checkpoint.config, tp_size, True)
        except LayoutError:
            return None


def inject_expert_faults(
    source: Path, recipe: Recipe, plan: Plan, ranks: RankProcesses, scratch: Path
) -> Iterator[tuple[str, Check]]:
    """Split rotated experts by an expert-parallel plan, and run level 3 beside the true source.

    Args:
        source: A small checkpoint of one file.
        recipe: Its recipe.
        plan: Its expert-parallel plan.
        ranks: The ranks to run the shards on.
        scratch: An empty folder.

    Yields:
        Each fault, and the check that should have failed.
    """
    every = group_stacks(plan)
    faults = {
        "experts rotated": every,
        "one weight of experts rotated": dict([*every.items()][-1:]),
    }
    for fault, stacks in faults.items():
        folder = scratch / fault.replace(" ", "-")
        rotate_experts(source, stacks, folder / "source")
        with Checkpoint(folder / "source") as checkpoint:
            manifest = split_checkpoint(
                checkpoint, plan, recipe, shard_destination(folder / "shards")
            )
        yield fault, check_numerics(folder / "shards", manifest, source, ShardedModel(ranks))


def group_stacks(plan: Plan) -> dict[str, list[Placement]]:
    """The tensors of experts, those of one stack in the order of its experts."""
    stacks: dict[str, list[Placement]] = {}
    for placement in plan.placements:
        if placement.style is EXPERT:
            stacks.setdefault(_name_stack(placement), []).append(placement)
    return {
        stack: sorted(same, key=lambda p: p.expert.number if p.expert else 0)
        for stack, same in stacks.items()
    }


def _name_stack(placement: Placement) -> str:
    """A tensor's name without the number of its expert."""
    if placement.expert is None:
        return placement.spec.name
    path, names = placement.spec.name.split("."), placement.expert.module_names
    at = max(at for at, name in enumerate(path) if name in names)
    return ".".join([*path[:at], "*", *path[at + 1 :]])


def rotate_experts(source: Path, stacks: Mapping[str, list[Placement]], folder: Path) -> None:
    """Write a checkpoint again with each of these experts in the place of the one before."""
    tensors = load_file(source / WEIGHT_FILE)
    for same in stacks.values():
        names = [placement.spec.name for placement in same]
        if same[0].expert is None:
            tensor, count = tensors[names[0]], same[0].sections[0].units
            blocks = tensor.reshape(count, -1).roll(1, 0)
            tensors[names[0]] = blocks.reshape(tensor.shape).contiguous()
        else:
            rotated = [tensors[name] for name in (*names[1:], names[0])]
            tensors |= dict(zip(names, rotated, strict=True))
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    save_file(tensors, folder / WEIGHT_FILE, {"format": "pt"})
