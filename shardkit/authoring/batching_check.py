"""Proves that sequences which join a running batch get what each would get alone."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardkit.authoring.pooled_engine import run_engine
from shardkit.checkpoint import Checkpoint, read_config
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import MODEL_ERRORS, ShardkitError, first_line
from shardkit.planning import make_plan
from shardkit.recipe import Recipe, compose_recipe
from shardkit.runtime import Engine, Limits
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.verification.dummy_inputs import has_placeholders
from shardkit.verification.models import ReferenceModel

BATCH_SIZE = 4
LENGTHS = (3, 1, 7, 4, 2, 6, 5)  # tokens of the prompts, more than run together
STEPS = (6, 9, 4, 7, 5, 8, 6)  # new tokens of each, so that they leave one by one
SMALL_IDS = range(3, 97)  # of the vocabulary; special tokens are often below
EXPECTED: tuple[type[Exception], ...] = (ShardkitError, *MODEL_ERRORS)


@dataclass(frozen=True)
class BatchingProof:
    """Whether the sequences of a model can join a running batch, and were then right.

    Attributes:
        tp_size: The number of ranks.
        obstacle: Why they cannot join; "" if they can.
        dtype: What they were computed in; "" if they cannot join.
        fault: What was wrong; "" if every sequence was that of `generate`.
    """

    tp_size: int
    obstacle: str
    dtype: str = ""
    fault: str = ""


def prove_batching(
    source: Path, recipe: Recipe, ranks: RankProcesses, scratch: Path
) -> BatchingProof:
    """Compare sequences that join and leave with the unsharded model's `generate`, one by one.

    If float32 gives other tokens, float64 decides whether rounding was why: two tokens can be
    almost equally probable.

    Args:
        source: A small checkpoint.
        recipe: Its recipe.
        ranks: What runs the shards.
        scratch: An empty folder for them.
    """
    recipe = compose_recipe(recipe, read_config(source))
    with Checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint.specs(), recipe, checkpoint.config, ranks.size)
        split_checkpoint(checkpoint, plan, recipe, shard_destination(scratch / "shards"))
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        try:
            with run_engine(
                ranks, scratch / "shards", Limits(max_batch_size=BATCH_SIZE), dtype
            ) as engine:
                if obstacle := engine.status().obstacle:
                    return BatchingProof(ranks.size, obstacle)
                fault = compare_sequences(engine, ReferenceModel(source, dtype))
        except EXPECTED as error:
            fault = f"{type(error).__name__}: {first_line(error)}"
        if not fault:
            break
    return BatchingProof(ranks.size, "", name, fault)


def compare_sequences(engine: Engine, reference: ReferenceModel) -> str:
    """What differs between sequences that share a batch and those made alone; "" if nothing."""
    prompts = make_prompts(reference, engine.abilities.vocabulary or len(SMALL_IDS))
    before = engine.status().steps
    outputs = asyncio.run(_generate_together(engine, prompts))
    steps = engine.status().steps - before
    if not max(STEPS) <= steps < sum(STEPS):
        return f"{steps} steps: the sequences did not share a batch"
    for prompt, count, ids in zip(prompts, STEPS, outputs, strict=True):
        inputs = {"input_ids": torch.tensor([prompt])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        alone = reference.generate(inputs, count).ids
        if not torch.equal(alone, ids):
            return f"after {prompt}: {ids[0].tolist()} instead of {alone[0].tolist()}"
    return ""


async def _generate_together(
    engine: Engine, prompts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    options = [{"max_new_tokens": count, "min_new_tokens": count} for count in STEPS]
    outputs: list[torch.Tensor] = await asyncio.gather(
        *(
            engine.agenerate([*prompt], do_sample=False, **each)
            for prompt, each in zip(prompts, options, strict=True)
        )
    )
    return outputs


def make_prompts(reference: ReferenceModel, vocabulary: int) -> list[list[int]]:
    """Prompts of LENGTHS, of tokens that stand for nothing but text."""
    config = reference.model.config
    special = set(_list_ids(config.to_dict()))
    ids = [
        token
        for token in SMALL_IDS
        if token < vocabulary
        and token not in special
        and not has_placeholders(reference.model, torch.tensor([[token]]))
    ]
    return [
        [ids[(5 * at + 3 * n) % len(ids)] for n in range(size)] for at, size in enumerate(LENGTHS)
    ]


def _list_ids(config: object) -> list[int]:
    """Every value of a config's fields whose names say that they are tokens, however deep."""
    ids: list[int] = []
    if isinstance(config, dict):
        for name, value in config.items():
            values = value if isinstance(value, list) else [value]
            if "token" in str(name):
                ids += [each for each in values if isinstance(each, int)]
            ids += [each for inner in values for each in _list_ids(inner)]
    return ids
