"""Proves that verification block by block, with ranks in turns, says what it says of whole models.

Each sample is verified both ways: as it is, and with faults: by a recipe with one rule wrong, or
with one tensor changed. Both must come to the same verdict, and blame the same tensors.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file

from shardkit.authoring.expert_faults import group_stacks, plan_whole_experts, rotate_experts
from shardkit.authoring.masked_sum import WEIGHT_FILE
from shardkit.authoring.mutations import list_mutants, list_rules
from shardkit.authoring.rank_pool import RankPool
from shardkit.checkpoint import Checkpoint, read_config
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import MODEL_ERRORS, CheckpointError, RecipeError, ShardkitError, first_line
from shardkit.layout.style import REPLICATE
from shardkit.planning import Plan, make_plan
from shardkit.recipe import Recipe, compose_recipe
from shardkit.verification.block_check import check_blocks
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.models import ReferenceModel, ShardedModel
from shardkit.verification.numerics import check_numerics
from shardkit.verification.report import Check

MAX_FAULTS = 16  # wrong rules of a sample that are verified, of those of which shards can be made
WHOLE_EXPERTS = "with whole experts"
BLAME = "tensors to blame: "
SOURCE_ERROR, SHARDS_ERROR = "the unsharded model does not run", "the shards do not run"


@dataclass(frozen=True)
class Opinion:
    """What a verification says of shards.

    Attributes:
        verdict: "passed", "failed", or what cannot be run.
        tensors: The tensors that it blames, in words; "" if none.
        text: Its faults, in one line.
    """

    verdict: str
    tensors: str = ""
    text: str = ""


@dataclass(frozen=True)
class Agreement:
    """What both ways of verification say of the same shards.

    Attributes:
        fault: What is wrong with the shards; "" if nothing.
        pattern: The rule or the tensor that is wrong.
        whole: What whole models on real ranks say.
        blocks: What blocks say, with ranks that take turns.
        is_unseen: Whether no output depends on what the blocks blame: whole models cannot see it.
    """

    fault: str
    pattern: str
    whole: Opinion
    blocks: Opinion
    is_unseen: bool = False

    @property
    def is_stricter(self) -> bool:
        """Whether the blocks alone find the fault."""
        return bool(self.fault) and (self.whole.verdict, self.blocks.verdict) == (
            "passed",
            "failed",
        )

    @property
    def difference(self) -> str:
        """How they differ; "" if they do not.

        Decoding of whole models blames no tensor; then the blocks may blame one.
        """
        whole, blocks = self.whole, self.blocks
        if self.is_unseen:
            return ""
        title = " ".join(filter(None, (self.fault, self.pattern))) or "as it is"
        if whole.verdict != blocks.verdict:
            return f"{title}: {whole.verdict} whole, {blocks.verdict} by blocks: " + (
                blocks.text or whole.text
            )
        if whole.tensors and whole.tensors != blocks.tensors:
            return f"{title}: whole models blame {whole.tensors}; blocks {blocks.tensors or 'none'}"
        return "" if self.fault or whole.verdict == "passed" else f"{title}: {whole.text}"


def compare_verdicts(
    source: Path, recipe: Recipe, tp_size: int, pool: RankPool, scratch: Path
) -> Iterator[Agreement]:
    """Verify a small checkpoint of one file both ways: right shards, then wrong ones.

    Args:
        source: The checkpoint.
        recipe: Its recipe.
        tp_size: The number of ranks.
        pool: The real ranks.
        scratch: An empty folder.
    """
    recipe = compose_recipe(recipe, read_config(source))
    pair = _Pair(source, tp_size, pool, scratch)
    plan = pair.plan(recipe)
    if plan is None:
        raise RecipeError(f"{source}: its own recipe {recipe.name!r} does not plan it")
    yield pair.compare(recipe, plan)
    yield from islice(_list_wrong_rules(pair, recipe, plan), MAX_FAULTS)
    name = choose_tensor(plan)
    changed = change_tensor(source, name, scratch / "changed")
    yield pair.compare(recipe, plan, ("one tensor changed", name), changed)
    if (whole_experts := plan_whole_experts(source, recipe, tp_size)) is None:
        return
    yield pair.compare(recipe, whole_experts, ("", WHOLE_EXPERTS))
    stacks = group_stacks(whole_experts)
    rotate_experts(source, stacks, scratch / "rotated")
    fault = "experts rotated", next(iter(stacks))
    yield pair.compare(recipe, whole_experts, fault, scratch / "rotated")


def _list_wrong_rules(pair: "_Pair", recipe: Recipe, plan: Plan) -> Iterator[Agreement]:
    """Verify shards by the recipe with one rule wrong: another one first for each sample."""
    mutants = [*list_mutants(recipe, list_rules(recipe, plan))]
    start = crc32(pair.source.name.encode()) % max(len(mutants), 1)
    for mutant in (*mutants[start:], *mutants[:start]):
        if (wrong := pair.plan(mutant.recipe)) is not None:
            yield pair.compare(mutant.recipe, wrong, (mutant.fault, mutant.pattern))


def choose_tensor(plan: Plan) -> str:
    """A tensor of a plan that is divided, if one is; another one for each set of names."""
    names = [p.spec.name for p in plan.placements if p.style is not REPLICATE]
    names = names or [placement.spec.name for placement in plan.placements]
    return names[crc32("".join(names).encode()) % len(names)]


def change_tensor(source: Path, name: str, folder: Path) -> Path:
    """Write a checkpoint again with each number of one tensor about half as large again, or less.

    Returns:
        `folder`.
    """
    shutil.copytree(source, folder)
    tensors = load_file(source / WEIGHT_FILE)
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] = (tensors[name] * (1 + noise / 2)).to(tensors[name].dtype)
    save_file(tensors, folder / WEIGHT_FILE, {"format": "pt"})
    return folder


def is_unused(source: Path, plan: Plan, opinion: Opinion, folder: Path) -> bool:
    """Whether no output of the unsharded model depends on the tensors that are blamed.

    They are changed for that; `folder` must not be there.
    """
    blamed = [p.spec.name for p in plan.placements if f"{p.spec.name} (" in opinion.tensors]
    model = ReferenceModel(source, torch.float32)
    inputs = make_inputs(model.model)
    right = model.forward(inputs)
    for name in blamed:
        changed = change_tensor(source, name, folder)
        wrong = ReferenceModel(changed, torch.float32).forward(inputs)
        shutil.rmtree(changed)
        if not all(torch.equal(wrong[key], value) for key, value in right.items()):
            return False
    return bool(blamed)


@dataclass(frozen=True)
class _Pair:
    """A checkpoint, and the ranks that its shards are verified on beside those in turns."""

    source: Path
    tp_size: int
    pool: RankPool
    scratch: Path

    def plan(self, recipe: Recipe) -> Plan | None:
        """The plan of a recipe; None if it is refused before there are shards."""
        with Checkpoint(self.source) as checkpoint:
            try:
                specs, config = checkpoint.specs(), checkpoint.config
                return make_plan(specs, recipe, config, self.tp_size)
            except ShardkitError:
                return None

    def compare(
        self,
        recipe: Recipe,
        plan: Plan,
        fault: tuple[str, str] = ("", ""),
        changed: Path | None = None,
    ) -> Agreement:
        """Split the source, or what was made of it, and verify it against the source both ways."""
        folder = self.scratch / "shards"
        with Checkpoint(changed or self.source) as checkpoint:
            manifest = split_checkpoint(checkpoint, plan, recipe, shard_destination(folder))
        split = folder, manifest, self.source
        ranks = self.pool.of(self.tp_size)
        whole = _ask(lambda: check_numerics(*split, ShardedModel(ranks)))
        blocks = _ask(lambda: check_blocks(*split))
        shutil.rmtree(folder)
        agreement = Agreement(*fault, whole, blocks)
        if agreement.is_stricter and is_unused(self.source, plan, blocks, self.scratch / "other"):
            return replace(agreement, is_unseen=True)
        return agreement


def _ask(check: Callable[[], Check]) -> Opinion:
    """What a check says; if it cannot be run, why, as `verify` has it."""
    try:
        result = check()
    except CheckpointError as error:
        return Opinion(SOURCE_ERROR, text=str(error))
    except ShardkitError as error:
        return Opinion(SHARDS_ERROR, text=str(error))
    except MODEL_ERRORS as error:  # which no check lets through: a difference
        return Opinion(f"raises {type(error).__name__}", text=first_line(error))
    text = " ".join(result.faults)
    return Opinion(result.verdict, text.partition(BLAME)[2], text)
