"""`shardkit.plan`: what a split of a checkpoint would hold and cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardkit.checkpoint import open_source
from shardkit.errors import LayoutError, RecipeError
from shardkit.planning.advice import Advice, Devices, advise_devices
from shardkit.planning.checkpoint_plan import plan_for
from shardkit.planning.collectives import Collectives, count_collectives
from shardkit.planning.kv_cache import KvCache, estimate_kv_cache
from shardkit.planning.kv_copies import KvCopies, find_kv_copies
from shardkit.planning.layout_plan import Plan
from shardkit.planning.parts import generates_text
from shardkit.planning.shared_blocks import count_shared_bytes
from shardkit.planning.summary import PlanSummary, find_blocking_tensor, summarize_plan
from shardkit.recipe import Recipe
from shardkit.strict_json import put_off_collection


@dataclass(frozen=True)
class PlanReport:
    """A plan of one checkpoint, and what follows from it and the checkpoint's config.

    Attributes:
        source: What the checkpoint is called: the folder's name, or the Hub id.
        revision: The commit of a Hub repository; else empty.
        model_type: What config.json says.
        recipe: The recipe that was used.
        plan: Where every tensor lies.
        config: The checkpoint's config.json.
        warnings: What is wrong with the source and does no harm, a line each.
    """

    source: str
    revision: str
    model_type: str
    recipe: Recipe
    plan: Plan
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @cached_property
    def summary(self) -> PlanSummary:
        """Its tensors by layout, and bytes per rank."""
        return summarize_plan(self.plan)

    @property
    def max_tp_size(self) -> int:
        """The most ranks that the checkpoint can be divided over."""
        return self.plan.max_tp_size

    @property
    def blocking_tensor(self) -> str | None:
        """The tensor that allows no more ranks; None if nothing is divided."""
        return find_blocking_tensor(self.plan)

    @property
    def generates_text(self) -> bool:
        """Whether the model produces text; an encoder alone does not."""
        return generates_text(self.plan, self.config)

    @cached_property
    def kv_cache(self) -> KvCache | str:
        """What one token adds to the cache; or in words that there is none, or why unknown."""
        return estimate_kv_cache(self.plan, self.config)

    @cached_property
    def kv_copies(self) -> KvCopies | None:
        """What copies of kv heads cost; None if there are none."""
        return find_kv_copies(self.plan, self.config)

    @cached_property
    def shared_block_bytes(self) -> int:
        """What all ranks store of quantized blocks beyond what they compute of them."""
        return count_shared_bytes(self.plan)

    @cached_property
    def collectives(self) -> Collectives:
        """What the ranks exchange in one forward pass."""
        return count_collectives(self.plan, self.config)


def plan(
    source: str | Path,
    tp_size: int,
    *,
    recipe: str | Recipe | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    expert_parallel: bool = False,
) -> PlanReport:
    """Plan a split from headers and the config alone: bytes per rank, KV cache, collectives.

    Args:
        source: A folder of safetensors files with its config.json, or a Hub id.
        tp_size: The number of ranks.
        recipe: The name of a bundled recipe, the path of a file ending in `.toml`, or a recipe;
            by default the one for the config's model_type.
        revision: A branch, tag or commit of a Hub repository.
        allow_pickle: Whether pickled `.bin` weights may be converted if there are no safetensors.
        expert_parallel: Whether each rank has whole experts, instead of a part of every one.

    Raises:
        CheckpointError: If the source is missing, damaged or not to be trusted.
        RecipeError: If no recipe fits, or a tensor has no rule.
        LayoutError: If the checkpoint cannot be divided over so many ranks.

    Example:
        >>> report = plan("models/llama", tp_size=4)  # doctest: +SKIP
        >>> report.summary.loaded_bytes, report.max_tp_size  # doctest: +SKIP
    """
    with put_off_collection(), open_source(source, revision, allow_pickle) as checkpoint:
        used, made_plan = plan_for(checkpoint, tp_size, recipe, expert_parallel)
        return PlanReport(
            checkpoint.name,
            checkpoint.revision,
            checkpoint.model_type,
            used,
            made_plan,
            checkpoint.config,
            checkpoint.warnings,
        )


def compare_sizes(
    source: str | Path,
    devices: Devices,
    *,
    recipe: str | Recipe | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Advice:
    """Compare the numbers of ranks that a checkpoint could be divided over on some devices.

    Args:
        source: As for `plan`.
        devices: The devices.
        recipe: As for `plan`.
        revision: As for `plan`.
        allow_pickle: As for `plan`.

    Raises:
        UsageError: There is no such link, or there are no devices or no memory.
        CheckpointError: As for `plan`.
        RecipeError: As for `plan`.
    """
    with put_off_collection(), open_source(source, revision, allow_pickle) as checkpoint:
        used, made_plan = plan_for(checkpoint, 1, recipe)
        try:
            _, expert_plan = plan_for(checkpoint, 1, used, expert_parallel=True)
        except (LayoutError, RecipeError):  # of a model without experts
            return advise_devices(made_plan, None, checkpoint.config, devices)
        return advise_devices(made_plan, expert_plan, checkpoint.config, devices)
